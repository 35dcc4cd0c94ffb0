"""What may take the place of a convolution in a model: the same function, computed in another way.

Each takes a layer and gives the module to put where it was:

    model.set_submodule(name, replace.dense(model.get_submodule(name)))
"""

from __future__ import annotations

from typing import Any

import inductor_vision
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def dense_weight(weight: Tensor, groups: int) -> Tensor:
    """``[O, C / groups, ...]`` of a grouped convolution as ``[O, C, ...]`` of a plain one, zero from group to group."""
    outputs, channels = weight.shape[0] // groups, weight.shape[1]
    with torch.no_grad():
        out = weight.new_zeros(weight.shape[0], channels * groups, *weight.shape[2:])
        for group in range(groups):
            rows = slice(group * outputs, (group + 1) * outputs)
            out[rows, group * channels : (group + 1) * channels] = weight[rows]
    return out


def dense(layer: nn.Conv2d) -> nn.Conv2d:
    """A grouped convolution as one of a single group: more arithmetic, better kernels.

    A value that is not finite, times the zeros, reaches all groups.
    """
    out = nn.Conv2d(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.dilation,
        bias=layer.bias is not None,
        padding_mode=layer.padding_mode,
        device=layer.weight.device,
        dtype=layer.weight.dtype,
    )
    with torch.no_grad():
        out.weight.copy_(dense_weight(layer.weight, layer.groups))
    out.bias = layer.bias
    return out.train(layer.training)


class ImageByImage(nn.Module):
    """A layer, called for one image of the batch after the other: what it reads and writes may fit the cache then."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *inputs: Tensor | None) -> Tensor:
        batch = inputs[0].shape[0]
        images = zip(*([None] * batch if input is None else input.split(1) for input in inputs))
        return torch.cat([self.layer(*image) for image in images])


class Computing(nn.Module):
    """A layer in a dtype or memory format of its own. Results have the dtype of the input."""

    def __init__(
        self, layer: nn.Module, dtype: torch.dtype | None = None, memory_format: torch.memory_format | None = None
    ) -> None:
        super().__init__()
        self.layer = layer.to(dtype=dtype, memory_format=memory_format)
        self.dtype, self.memory_format = dtype, memory_format

    def forward(self, input: Tensor) -> Tensor:
        x = input if self.dtype is None else input.to(self.dtype)
        x = x if self.memory_format is None else x.contiguous(memory_format=self.memory_format)
        return self.layer(x).to(input.dtype)


class PatchConv2d(nn.Module):
    """A convolution over a batch of many small images as :func:`inductor_vision.patch_conv2d`."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, input: Tensor) -> Tensor:
        layer, padding = self.layer, self.layer.padding
        if layer.padding_mode != "zeros" or isinstance(padding, str):  # then the border is made beforehand
            mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
            input = F.pad(input, layer._reversed_padding_repeated_twice, mode=mode)
            padding = (0, 0)
        return inductor_vision.patch_conv2d(
            input, layer.weight, layer.bias, layer.stride, padding, layer.dilation, layer.groups
        )


def deform_conv2d(layer: Any) -> inductor_vision.DeformConv2d:
    """torchvision's ``DeformConv2d`` as this package's, with the same parameters."""
    out = inductor_vision.DeformConv2d(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.groups,
        bias=layer.bias is not None,
    )
    out.weight, out.bias = layer.weight, layer.bias
    return out.train(layer.training)


def compiled(layer: nn.Module) -> nn.Module:
    """Compile a layer by itself, its weights packed once: from now on all that this process compiles under
    ``torch.no_grad()`` has constant weights."""
    inductor_vision.freeze_weights()
    layer.compile()
    return layer
