"""What may be chosen for a single convolution: how each choice is called, and whether it can be made in a model."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import inductor_vision
import torch
from torch import Tensor, nn

from ..perf.backends import Holding, compiled
from ..perf.spec import Prepared
from . import replace
from .capture import Layer

AS_IT_IS = "as it is"
CHANNELS_LAST, CONTIGUOUS = "channels_last", "contiguous"
BFLOAT16, FLOAT32 = "bfloat16", "float32"
DENSE, IMAGE_BY_IMAGE = "dense", "image by image"
PATCHES, DEFORM, COMPILED = "patch_conv2d", "deform_conv2d", "compiled"

LAYOUTS = {CHANNELS_LAST: torch.channels_last, CONTIGUOUS: torch.contiguous_format}
DTYPES = {BFLOAT16: torch.bfloat16, FLOAT32: torch.float32}


@dataclasses.dataclass(frozen=True)
class Replacement:
    """A choice that is made in a model by putting another module in a layer's place.

    Attributes:
        make: gives the other module.
        code: an expression of the same, of a variable ``layer``.
        compiles: whether it compiles that module.
    """

    make: Callable[[Any], nn.Module]
    code: str
    compiles: bool = False


REPLACEMENTS = {
    CHANNELS_LAST: Replacement(
        lambda layer: replace.Computing(layer, memory_format=torch.channels_last),
        "replace.Computing(layer, memory_format=torch.channels_last)",
    ),
    CONTIGUOUS: Replacement(
        lambda layer: replace.Computing(layer, memory_format=torch.contiguous_format),
        "replace.Computing(layer, memory_format=torch.contiguous_format)",
    ),
    BFLOAT16: Replacement(
        lambda layer: replace.Computing(layer, dtype=torch.bfloat16), "replace.Computing(layer, dtype=torch.bfloat16)"
    ),
    FLOAT32: Replacement(
        lambda layer: replace.Computing(layer, dtype=torch.float32), "replace.Computing(layer, dtype=torch.float32)"
    ),
    DENSE: Replacement(replace.dense, "replace.dense(layer)"),
    IMAGE_BY_IMAGE: Replacement(replace.ImageByImage, "replace.ImageByImage(layer)"),
    PATCHES: Replacement(
        lambda layer: replace.compiled(replace.PatchConv2d(layer)),
        "replace.compiled(replace.PatchConv2d(layer))",
        compiles=True,
    ),
    DEFORM: Replacement(
        lambda layer: replace.compiled(replace.deform_conv2d(layer)),
        "replace.compiled(replace.deform_conv2d(layer))",
        compiles=True,
    ),
    COMPILED: Replacement(replace.compiled, "replace.compiled(layer)", compiles=True),
}

# A convolution over at least so many images of at most such a side is one over patches.
_PATCH_SIDE, _PATCH_BATCH = 16, 256
_MOST_GROUPS_MADE_DENSE = 32  # beyond, the zeros are nearly all of the work
_MOST_IMAGES_ONE_BY_ONE = 64
# Which arguments have a row for each image: of the deformable one offset and mask too.
_WITH_IMAGES = {"aten::convolution": (0,), "torchvision::deform_conv2d": (0, 2, 3)}


@dataclasses.dataclass(frozen=True)
class Choice:
    """A way to compute a layer.

    Attributes:
        name: also the key in :data:`REPLACEMENTS` where a module can be put in the layer's place.
        prepare: makes what is called, and its first result.
        threads: a fixed number of threads.
        compiles: whether it takes a compiler.
        changes_precision: whether results are those of another dtype.
    """

    name: str
    prepare: Callable[[], Prepared]
    threads: int | None = None
    compiles: bool = False
    changes_precision: bool = False


def thread_numbers(most: int) -> list[int]:
    """1, 2, 4 and so on, below ``most``, which is what everything else is measured with."""
    return [2**i for i in range(most.bit_length()) if 2**i < most]


def as_it_is(layer: Layer) -> Choice:
    """The layer as the model computes it, on random numbers of the shape and strides that it sees."""
    return Choice(AS_IT_IS, lambda: _called(_operator(layer), _arguments(layer)))


def choices_of(layer: Layer, threads: int, *, compiling: bool) -> list[Choice]:
    """What is worth measuring for a layer. Nothing is known for 1-D, 3-D and transposed convolutions."""
    if layer.is_convolution and layer.kind in ("1-D", "3-D", "transposed"):
        return []
    choices = [*(_of_convolution(layer) if layer.is_convolution else _of_operator(layer)), *_of_batch(layer)]
    choices += [
        dataclasses.replace(as_it_is(layer), name=_threads_name(number), threads=number)
        for number in thread_numbers(threads)
    ]
    return [choice for choice in choices if compiling or not choice.compiles]


def _threads_name(number: int) -> str:
    return f"{number} thread{'s' * (number > 1)}"


def _of_convolution(layer: Layer) -> list[Choice]:
    function, groups = _operator(layer), layer.arguments[-1]

    def called(change: Callable[[Sequence[Any]], Sequence[Any]]) -> Callable[[], Prepared]:
        return lambda: _called(function, change(_arguments(layer)))

    layout = CONTIGUOUS if layer.input.is_channels_last else CHANNELS_LAST
    choices = [Choice(layout, called(functools.partial(_in_format, LAYOUTS[layout])))]
    dtype = {torch.float32: BFLOAT16, torch.bfloat16: FLOAT32, torch.float16: FLOAT32}.get(layer.input.dtype)
    if dtype:
        choices.append(Choice(dtype, called(functools.partial(_in_dtype, DTYPES[dtype])), changes_precision=True))
    if 1 < groups <= _MOST_GROUPS_MADE_DENSE:
        choices.append(Choice(DENSE, called(_made_dense)))
    batch, _, *sides = layer.input.shape
    if batch >= _PATCH_BATCH and max(sides) <= _PATCH_SIDE:
        choices.append(
            Choice(PATCHES, lambda: _compiled(_as_patches, _arguments(layer), constant=(1, 2)), compiles=True)
        )
    return choices


def _of_operator(layer: Layer) -> list[Choice]:
    """torchvision's operator as this package's; an operator of this package, which takes a compiler to be fast."""
    if layer.signature.operator == "torchvision::deform_conv2d":
        return [Choice(DEFORM, lambda: _compiled(_deform, _arguments(layer), constant=(1, 4)), compiles=True)]
    weights = tuple(i for i, a in enumerate(layer.arguments) if isinstance(a, nn.Parameter))
    return [Choice(COMPILED, lambda: _compiled(_operator(layer), _arguments(layer), constant=weights), compiles=True)]


def _of_batch(layer: Layer) -> list[Choice]:
    with_images = _WITH_IMAGES.get(layer.signature.operator)
    if with_images and 1 < layer.input.shape[0] <= _MOST_IMAGES_ONE_BY_ONE:
        return [Choice(IMAGE_BY_IMAGE, lambda: _image_by_image(layer, with_images))]
    return []


def _operator(layer: Layer) -> Callable[..., Tensor]:
    namespace, _, name = layer.signature.operator.partition("::")
    return getattr(getattr(torch.ops, namespace), name).default


def _arguments(layer: Layer) -> list[Any]:
    return [layer.input.random(), *layer.arguments[1:]]


def _called(function: Callable[..., Any], arguments: Sequence[Any]) -> Prepared:
    def call() -> Any:
        with torch.no_grad():
            return function(*arguments)

    return Prepared(call, call())


def _in_format(memory_format: torch.memory_format, arguments: Sequence[Any]) -> list[Any]:
    input, weight, *rest = arguments
    return [input.contiguous(memory_format=memory_format), weight.contiguous(memory_format=memory_format), *rest]


def _in_dtype(dtype: torch.dtype, arguments: Sequence[Any]) -> list[Any]:
    return [a.to(dtype) if isinstance(a, Tensor) else a for a in arguments]


def _made_dense(arguments: Sequence[Any]) -> list[Any]:
    input, weight, *rest, groups = arguments
    return [input, replace.dense_weight(weight, groups), *rest, 1]


def _image_by_image(layer: Layer, with_images: Sequence[int]) -> Prepared:
    function, arguments = _operator(layer), _arguments(layer)

    def one(i: int) -> Tensor:
        return function(*(a[i : i + 1] if at in with_images else a for at, a in enumerate(arguments)))

    return _called(lambda: torch.cat([one(i) for i in range(layer.input.shape[0])]), ())


def _as_patches(input: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
    stride, padding, dilation, _, _, groups = options
    return inductor_vision.patch_conv2d(input, weight, bias, stride, padding, dilation, groups)


def _deform(input: Tensor, weight: Tensor, offset: Tensor, mask: Tensor, bias: Tensor, *options: Any) -> Tensor:
    """The arguments of torchvision's operator, as its own function passes them on."""
    stride, padding, dilation, use_mask = options[0:2], options[2:4], options[4:6], options[8]
    return inductor_vision.deform_conv2d(
        input, offset, weight, bias, stride, padding, dilation, mask if use_mask else None
    )


def _compiled(function: Callable[..., Any], arguments: Sequence[Any], constant: Sequence[int]) -> Prepared:
    module = Holding(function, arguments, constant)
    torch._dynamo.reset()  # else the layers together exceed its limit of recompilations
    return compiled(module, module.inputs_among(arguments), dynamic=False)
