"""oneDNN's weights are packed not at all, or several times.

The fault, seen in torch 2.13: under freezing Inductor brings the weight of a convolution into oneDNN's order, for the
size of the map that the convolution is for. Where that size is dynamic it does not, and oneDNN reorders the weight at
every call. Where a layer serves several levels of a pyramid there is a packed weight for each.

The way around: dynamic sizes count as those at hand, and of packed weights that are alike one remains. The order
depends on channels and kernel, hardly on the size; where oneDNN wants another one, it reorders as it would have.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils._python_dispatch import _disable_current_modes

from ..common.sizes import depends_on_data, likely

_mkldnn = torch.ops.mkldnn


@contextlib.contextmanager
def weights_packed() -> Iterator[None]:
    """Within this context what is frozen has each convolution's weight packed, once."""
    from ..inductor.packaging import freezing

    with patch.object(freezing, "freezing_passes", _and_pack(freezing.freezing_passes)):
        yield


def _and_pack(original: Callable[..., None]) -> Callable[..., None]:
    def freezing_passes(module: GraphModule, example_inputs: Sequence[Any]) -> None:
        original(module, example_inputs)
        for conv in module.graph.find_nodes(op="call_function", target=_mkldnn._convolution_pointwise.default):
            _pack(conv)
        _merge(module)
        module.recompile()

    return freezing_passes


def _pack(conv: Node) -> None:
    """Have a convolution read a packed weight, where Inductor has left it as it is."""
    input, weight, _, *options = conv.args[:7]  # padding, stride, dilation, groups
    size = input.meta["val"].shape  # type: ignore[union-attr]  # an operator's input is a node
    if weight.op != "get_attr" or _tensor(weight).is_mkldnn or depends_on_data(*size):  # type: ignore[arg-type,union-attr]
        return
    # Of maps that are contiguous and channels_last both, Inductor expects contiguous results if sizes are dynamic, and
    # with a packed weight oneDNN gives channels_last ones.
    if any(isinstance(length, int) and length == 1 for length in size[1:]):
        return
    with conv.graph.inserting_before(conv):
        arguments = weight, *options, [likely(length) for length in size]
        conv.update_arg(1, conv.graph.call_function(_mkldnn._reorder_convolution_weight, arguments))


def _merge(module: GraphModule) -> None:
    """Leave one of the packed weights that are alike."""
    packed: dict[Any, Node] = {}
    for node in list(module.graph.find_nodes(op="call_function", target=_mkldnn._reorder_convolution_weight)):
        weight, *options, _ = node.args
        if weight.op != "get_attr":  # type: ignore[union-attr]  # a weight is a node
            continue
        with _disable_current_modes():  # those of fake tensors
            tensor = node.target(_tensor(weight), *node.args[1:])  # type: ignore[arg-type,operator]
            content = hashlib.sha256(ctypes.string_at(_mkldnn.data_ptr(tensor), _mkldnn._nbytes(tensor))).digest()
        first = packed.setdefault((tensor.shape, tensor.dtype, str(options), content), node)
        if first is not node:
            node.replace_all_uses_with(first)
            module.graph.erase_node(node)


def _tensor(constant: Node) -> Tensor:
    return operator.attrgetter(str(constant.target))(constant.graph.owning_module)
