"""Tensors of more elements than 32 bits count: what kernels are told of them, and what they compute positions in.

There is no memory for them. Programs are given fake tensors, and the last program of each kernel that they launch is
interpreted without any.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from inductor_vision.lowering.common.registry import _triton_program
from inductor_vision.ops.registry import OPS
from inductor_vision.tests.support.triton import TRITON_IS_MISSING, interpreting
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton", reason=TRITON_IS_MISSING)

from inductor_vision.lowering.triton import kernels

ONES = [[1, 1], [1, 1], [1, 1]]  # stride, padding and dilation


def empty(*shape: int) -> Tensor:
    return torch.empty(shape)


def channels_last(*shape: int) -> Tensor:
    return torch.empty(shape, memory_format=torch.channels_last)


# An operator and its arguments, of which a kernel reads or writes a tensor that is as large.
CALLS: dict[str, tuple[str, Any]] = {
    "weight of deform_conv2d": (
        "deform_conv2d",
        lambda: (empty(1, 256, 8, 8), empty(1, 18, 8, 8), empty(2**20, 256, 3, 3), None, *ONES, None),
    ),
    "offset of deform_conv2d": (
        "deform_conv2d",
        lambda: (
            empty(1, 16, 4096, 4096),
            empty(1, 16 * 18, 4096, 4096),
            empty(32, 16, 3, 3),
            None,
            *ONES,
            empty(1, 16 * 9, 4096, 4096),
        ),
    ),
    "gradients of deform_conv2d's weight": (
        "deform_conv2d_backward",
        lambda: (
            empty(64, 2048, 64, 64),
            empty(64, 2048, 64, 64),
            empty(64, 18, 64, 64),
            empty(2048, 2048, 3, 3),
            None,
            *ONES,
            None,
            [False, False, True, False, False],
        ),
    ),
    "gradients of deform_conv2d's offset": (
        "deform_conv2d_backward",
        lambda: (
            empty(1, 32, 4096, 4096),
            empty(1, 16, 4096, 4096),
            empty(1, 16 * 18, 4096, 4096),
            empty(32, 16, 3, 3),
            None,
            *ONES,
            empty(1, 16 * 9, 4096, 4096),
            [True, True, False, False, True],
        ),
    ),
    "weight of a depthwise deform_conv2d": (
        "deform_conv2d",
        lambda: (empty(1, 2**28, 1, 1), empty(1, 18, 1, 1), empty(2**28, 1, 3, 3), None, *ONES, None),
    ),
    "image of deform_conv2d": (
        "deform_conv2d",
        lambda: (
            empty(1, 1, 49152, 49152),
            empty(1, 2, 49152, 49152),
            empty(1, 1, 1, 1),
            None,
            [1, 1],
            [0, 0],
            [1, 1],
            None,
        ),
    ),
    "weight of patch_conv2d": (
        "patch_conv2d",
        lambda: (empty(1, 4, 256, 4, 4), empty(2**20, 256, 3, 3), None, *ONES),
    ),
    "gradients of patch_conv2d's weight": (
        "patch_conv2d_backward",
        lambda: (
            empty(64, 64, 2048, 8, 8),
            empty(64, 64, 2048, 8, 8),
            empty(2048, 2048, 3, 3),
            None,
            *ONES,
            [False, True, False],
        ),
    ),
    "gradients of patch_conv2d's input": (
        "patch_conv2d_backward",
        lambda: (
            empty(1, 4, 256, 4, 4),
            empty(1, 4, 2**20, 4, 4),
            empty(256, 2**20, 3, 3),
            None,
            *ONES,
            [True, False, False],
        ),
    ),
    "pointwise weight of depthwise_separable_conv2d": (
        "depthwise_separable_conv2d",
        lambda: (empty(1, 512, 4, 4), empty(512, 1, 3, 3), empty(2**23, 512, 1, 1), *[None] * 3, *ONES, "relu"),
    ),
    "where bins of roi_align are": (
        "roi_align",
        lambda: ([empty(2, 1, 64, 64)], empty(2**20, 5), None, [1.0], 512, 1, 2, False),
    ),
    "bins of roi_pool": ("roi_pool", lambda: (channels_last(2, 2**22, 2, 2), empty(1, 5), 1.0, 32, 32)),
    "heatmaps": ("heatmaps_to_keypoints", lambda: (channels_last(1, 2**20, 2, 8192), empty(1, 4))),
    "boxes of soft_nms": ("soft_nms", lambda: (empty(2**29, 4), empty(2**29), None, 0.3, 0.5, 1e-3, "linear")),
}


@dataclasses.dataclass(frozen=True)
class Launch:
    """A kernel that a program launches, with numbers and tensors by the names of its arguments."""

    function: Any
    grid: tuple[int, ...]
    constants: dict[str, Any]
    values: dict[str, Any]


def launches_of(call: str) -> list[Launch]:
    recorded: list[Launch] = []

    def record(
        *, kernel_idx: int, constant_args_idx: int, grid: Any, kwargs: dict[str, Any], **others: Any
    ) -> dict[str, Any]:
        function = kernels.kernel_side_table.get_kernel(kernel_idx)
        constants = kernels.kernel_side_table.get_constant_args(constant_args_idx)
        recorded.append(Launch(function, tuple(map(int, grid[0])), constants, kwargs))
        return kwargs

    op, arguments = CALLS[call]
    program = _triton_program(OPS[op])
    with FakeTensorMode(), patch.object(kernels, "triton_kernel_wrapper_functional", record):
        program.program(*arguments())
    return recorded


@pytest.mark.parametrize("call", CALLS)
def test_kernels_are_told(call):
    launches = launches_of(call)
    assert launches
    for launch in launches:
        tensors = [value for value in launch.values.values() if isinstance(value, Tensor)]
        large = any(tensor.numel() >= 2**31 - 2**16 for tensor in tensors)
        assert launch.constants["WIDE"] == large, launch.function
    assert any(launch.constants["WIDE"] for launch in launches)


class Place:
    """A tensor without memory: where it would be, which is far away from others."""

    def __init__(self, tensor: Tensor, number: int) -> None:
        self.dtype = tensor.dtype
        self.begin = (number + 1) << 44
        self.end = self.begin + tensor.numel() * tensor.dtype.itemsize

    def data_ptr(self) -> int:
        return self.begin


class NoMemory:
    """In place of the interpreter's: whatever is loaded is 1, and what is stored is forgotten. What is outside of a
    kernel's tensors is an error."""

    def __init__(self, places: Iterable[Place]) -> None:
        self.places = list(places)

    def check(self, pointers: np.ndarray, mask: np.ndarray) -> None:
        used = pointers[mask].astype(np.int64)
        inside = [(used >= place.begin) & (used < place.end) for place in self.places]
        assert np.any(inside, axis=0).all(), "a kernel reads or writes outside of its tensors"

    def load(self, pointers: np.ndarray, mask: np.ndarray, other: np.ndarray, dtype: Any) -> np.ndarray:
        self.check(pointers, mask)
        return np.ones(pointers.shape, dtype)

    def store(self, pointers: np.ndarray, values: np.ndarray, mask: np.ndarray) -> None:
        self.check(pointers, mask)

    def atomic_rmw(
        self, operation: Any, pointers: np.ndarray, values: np.ndarray, mask: np.ndarray, order: Any
    ) -> np.ndarray:
        self.check(pointers, mask)
        return values


@contextlib.contextmanager
def one_program(program: tuple[int, ...]) -> Iterator[None]:
    """Kernels are interpreted as one of their grid's programs; an integer that overflows is an error."""
    import triton.language as tl
    from triton.runtime import interpreter

    def program_id(builder: Any, axis: int) -> Any:
        return interpreter.TensorHandle(np.array([program[axis]], dtype=np.int32), tl.int32)

    options = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=True, debug=True)
    as_they_are = patch.multiple(
        interpreter.GridExecutor,
        _init_args_hst=lambda self, args, kwargs: (args, kwargs),
        _restore_args_dev=lambda self, *args: None,
    )
    with (
        as_they_are,
        patch.object(interpreter.InterpreterBuilder, "create_get_program_id", program_id),
        patch.object(interpreter.interpreter_builder, "options", options),
    ):
        yield


@pytest.mark.parametrize("call", [call for call in CALLS if call != "boxes of soft_nms"])  # which loops over all
def test_positions_do_not_overflow(call):
    from triton.runtime.interpreter import InterpretedFunction

    for launch in launches_of(call):
        values = {
            name: Place(value, number) if isinstance(value, Tensor) else int(value)
            for number, (name, value) in enumerate(launch.values.items())
        }
        places = [value for value in values.values() if isinstance(value, Place)]
        last = tuple(size - 1 for size in launch.grid)
        with interpreting(NoMemory(places)), one_program(last):
            InterpretedFunction(launch.function.fn)[1, 1, 1](**values, **launch.constants)
