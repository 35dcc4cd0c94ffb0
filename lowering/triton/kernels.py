"""How kernels are written and become part of a graph.

Kernels are functions in Triton's language under :data:`kernel`. Names of their arguments in capitals are constants of
their compilation. Where a tensor lies in memory they are told by its strides, and whether a position in any of their
tensors may need 64 bits by ``WIDE``. What is multiplied by a stride, or by the length of a row, goes through
:func:`positions` before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import SymInt, Tensor
from torch._prims_common import suggest_memory_format
from triton.runtime.jit import JITFunction

from ..inductor.codegen import kernel_side_table, statically_known_true, triton_kernel_wrapper_functional

# Arguments of kernels have no types in Python.
# mypy: disable-error-code="no-untyped-def"

# Not triton.jit: that gives, under TRITON_INTERPRET=1, what no graph can take.
kernel = JITFunction

Grid = tuple[int | SymInt, ...]


def launch(function: JITFunction, grid: Grid, outputs: dict[str, Tensor], **arguments: Any) -> tuple[Tensor, ...]:
    """Add a kernel to the graph that is being traced.

    Args:
        grid: how many programs there are, along up to three axes.
        outputs: what the kernel writes, by the names of its arguments; fresh memory, or what it is to add to.
        arguments: its others, without ``GPU`` and ``WIDE``, which a kernel that has them gets from here. Tensors must
            be :func:`dense`: what Inductor passes has their order, not their strides.

    Returns:
        The outputs as they are afterwards.
    """
    constants = {name: value for name, value in arguments.items() if name.isupper()}
    if "GPU" in function.arg_names:
        constants["GPU"] = on_gpu(next(iter(outputs.values())))
    if "WIDE" in function.arg_names:
        everything = (*arguments.values(), *outputs.values())
        constants["WIDE"] = _wide([value for value in everything if isinstance(value, Tensor)])
    values = {name: value for name, value in arguments.items() if name not in constants}
    results = triton_kernel_wrapper_functional(
        kernel_idx=kernel_side_table.add_kernel(function),
        constant_args_idx=kernel_side_table.add_constant_args(constants),
        grid=[(*grid, *[1] * (3 - len(grid)))],
        tma_descriptor_metadata={},
        kwargs={**values, **outputs},
        tensors_to_clone=list(outputs),
    )
    return tuple(results[name] for name in outputs)


def dense(tensor: Tensor) -> Tensor:
    """The tensor without gaps or repetition in memory, channels_last if it was."""
    return tensor.contiguous(memory_format=suggest_memory_format(tensor))


def _wide(tensors: Sequence[Tensor]) -> bool:
    """Whether positions in one of them may not fit in 32 bits; sizes that are not known may be of any magnitude.

    Some are left for positions behind the end, in the last block, that are computed and not used.
    """
    return not all(statically_known_true(tensor.numel() < 2**31 - 2**16) for tensor in tensors)


def on_gpu(tensor: Tensor) -> bool:
    """Whether kernels on this tensor are compiled for a GPU."""
    return tensor.device.type != "cpu"


def power_of_two(size: int | SymInt, most: int) -> int:
    """The size of a block for so many elements; ``most`` where their number is not known."""
    return min(triton.next_power_of_2(max(size, 1)), most) if isinstance(size, int) else most


def refuse_if_deterministic(*args: Any) -> str | None:
    """The refusal of programs that add to one place from several programs of a kernel."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    return "torch.use_deterministic_algorithms is on, and a kernel would add in any order" if deterministic else None


def adding_block(block: int, most_on_cpu: int, tensor: Tensor) -> int:
    """The size of a block of which each element is added atomically; Triton-CPU makes a branch of code for each."""
    return block if on_gpu(tensor) else min(block, most_on_cpu)


# Pixels whose products one program adds up, for the gradient of a weight; sums of parts are added in their order.
PART_PIXELS = 4096


def product_blocks(dtype: torch.dtype, channels: int, outputs: int, most_outputs: int = 128) -> dict[str, int]:
    """The blocks of a product of matrices, pixels by channels by outputs; of float64, which takes more room in
    registers, half as many of each. A product has at least 16."""
    half = 2 if dtype == torch.float64 else 1
    return {
        "BLOCK_PIXELS": 64 // half,
        "BLOCK_CHANNELS": max(16, power_of_two(channels, 32 // half)),
        "BLOCK_OUTPUTS": max(16, power_of_two(outputs, most_outputs // half)),
    }


def filters_of(weight: Tensor) -> Tensor:
    """``[K, group channels, outputs]`` from ``[outputs, group channels, kH, kW]``."""
    return weight.flatten(2).permute(2, 1, 0).contiguous()


@kernel
def positions(numbers, WIDE: tl.constexpr):
    """Numbers from which positions in memory are computed, in as many bits as these may need."""
    return tl.cast(numbers, tl.int64) if WIDE else numbers


@kernel
def quotient(a, b):
    """Divide and round as a processor does, which a GPU's division in float32 does not by itself."""
    return tl.div_rn(a, b) if a.dtype == tl.float32 else a / b


@kernel
def wait_for_stores(GPU: tl.constexpr):
    """What one thread of a program stored, all of them load from here on. On a CPU a program has one thread, and
    Triton-CPU no barrier."""
    if GPU:
        tl.debug_barrier()


@kernel
def block_of_pixels(first, BLOCK: tl.constexpr, pixels, image_pixels, width):
    """Which pixels of a block of the pixels of all images exist, their image, row and column."""
    pixel = first + tl.arange(0, BLOCK)
    exists = pixel < pixels
    pixel = tl.where(exists, pixel, 0)
    place = pixel % image_pixels
    return exists, pixel // image_pixels, (place // width).to(tl.int32), (place % width).to(tl.int32)


@kernel
def load_block(at, rows, columns, rows_exist, columns_exist, DOUBLE: tl.constexpr):
    """``[rows, columns]`` from positions of both, zero where there is none, in the dtype that is computed in."""
    mask = rows_exist[:, None] & columns_exist[None, :]
    values = tl.load(at + rows[:, None] + columns[None, :], mask=mask, other=0.0)
    return values.to(tl.float64 if DOUBLE else tl.float32)


def strides(**tensors: Tensor) -> dict[str, int | SymInt]:
    """Those of tensors ``[image, channel, row, column]``, by the names that kernels have for them; of five dimensions
    the second is ``patch``."""
    steps: dict[str, int | SymInt] = {}
    for name, tensor in tensors.items():
        axes = ("image", "patch", "channel", "row", "column") if tensor.dim() == 5 else _AXES
        steps.update({f"{name}_{axis}": step for axis, step in zip(axes, tensor.stride())})
    return steps


_AXES = ("image", "channel", "row", "column")


def in_format_of(like: Tensor, shape: Sequence[Any], make: Callable[..., Tensor], dtype: torch.dtype) -> Tensor:
    """A tensor of that shape that lies in memory as another, without a copy to bring it there.

    Args:
        make: ``like.new_empty`` or such.
    """
    if suggest_memory_format(like) != torch.channels_last:
        return make(tuple(shape), dtype=dtype)
    batch, channels, height, width = shape
    return make((batch, height, width, channels), dtype=dtype).permute(0, 3, 1, 2)


def dot_precision(tensor: Tensor) -> str:
    """How products of float32 matrices are computed: as torch's own."""
    nvidia = tensor.device.type == "cuda" and torch.version.hip is None
    return "tf32" if nvidia and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def geometry_of(weight: Tensor, *pairs: Sequence[int]) -> dict[str, int]:
    """The taps of a kernel and its stride, padding and dilation, as constants of a compilation."""
    names = (f"{what}_{axis}" for what in ("STRIDE", "PADDING", "DILATION") for axis in "YX")
    numbers = dict(zip(names, (int(number) for pair in pairs for number in pair)))
    height, width = map(int, weight.shape[2:])
    return {"K": height * width, "KERNEL_WIDTH": width, **numbers}
