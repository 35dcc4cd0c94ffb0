"""How kernels are written and become part of a graph.

Kernels are functions in Triton's language under :data:`kernel`. Names of their arguments in capitals are constants of
their compilation. Where a tensor lies in memory they are told by its strides, and whether a position in it may need 64
bits by ``WIDE``, see :func:`wide`.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import SymInt, Tensor
from torch._prims_common import suggest_memory_format
from triton.runtime.jit import JITFunction

from ..inductor import kernel_side_table, statically_known_true, triton_kernel_wrapper_functional

# Not triton.jit: that gives, under TRITON_INTERPRET=1, what no graph can take.
kernel = JITFunction

Grid = tuple[int | SymInt, ...]


def launch(function: JITFunction, grid: Grid, outputs: dict[str, Tensor], **arguments: Any) -> tuple[Tensor, ...]:
    """Add a kernel to the graph that is being traced.

    Args:
        grid: how many programs there are, along up to three axes.
        outputs: what the kernel writes, by the names of its arguments; fresh memory, or what it is to add to.
        arguments: its other arguments. Tensors must be :func:`dense`: what Inductor passes has their order, not their
            strides.

    Returns:
        The outputs as they are afterwards.
    """
    constants = {name: value for name, value in arguments.items() if name.isupper()}
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
    """The same, without gaps or repetition in memory, channels_last if it was."""
    return tensor.contiguous(memory_format=suggest_memory_format(tensor))


def wide(*tensors: Tensor) -> bool:
    """Whether positions in one of them may not fit in 32 bits; sizes that are not known may be of any magnitude."""
    return not all(statically_known_true(tensor.numel() < 2**31) for tensor in tensors)


def power_of_two(size: int, most: int) -> int:
    """The size of a block for so many elements."""
    return min(triton.next_power_of_2(max(size, 1)), most)


@kernel
def positions(WIDE: tl.constexpr, like):  # type: ignore[no-untyped-def]
    """Numbers from which positions in memory are computed, in as many bits as these may need."""
    return like.to(tl.int64) if WIDE else like
