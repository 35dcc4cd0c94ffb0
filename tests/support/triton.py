"""A Triton for the CPU that interprets: the Triton code that Inductor generates runs where nothing compiles it.

Triton compiles for GPUs; its fork Triton-CPU has a backend named "cpu", which Inductor uses for tensors on the CPU
under ``torch._inductor.config.cpu_backend = "triton"``. Where that is missing, :func:`interpreter_installed` puts one
of its own in its place: kernels are compiled as far as Triton's own representation, which checks their types, and are
launched in Triton's interpreter, which computes them with numpy.

The interpreter's own switch, ``TRITON_INTERPRET``, is not used. It is for a whole process, and kernels that are
imported while it is on are of a kind that Inductor cannot take into a graph.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch.torch_version import TorchVersion
from torch.utils._pytree import tree_map


@dataclasses.dataclass(frozen=True)
class _Options:
    """What Triton and Inductor ask of a backend's options."""

    backend_name: str = "cpu"
    arch: str = ""
    num_warps: int = 4
    num_stages: int = 1
    num_ctas: int = 1
    maxnreg: int | None = None
    cluster_dims: tuple[int, int, int] = (1, 1, 1)
    extern_libs: dict[str, str] | None = None
    debug: bool = False
    sanitize_overflow: bool = False
    enable_fp_fusion: bool = False
    launch_cooperative_grid: bool = False
    supported_fp8_dtypes: tuple[str, ...] = ()
    deprecated_fp8_dot_operand_dtypes: tuple[str, ...] = ()
    default_dot_input_precision: str = "ieee"
    allowed_dot_input_precisions: tuple[str, ...] = ("ieee", "tf32", "tf32x3")
    max_num_imprecise_acc_default: int = 0
    instrumentation_mode: str = ""

    def hash(self) -> str:
        return hashlib.sha256(repr(self).encode()).hexdigest()


def is_compiled_for_cpu() -> bool:
    """Whether there is a Triton that compiles for the CPU."""
    from triton.backends import backends

    return "cpu" in backends


@contextlib.contextmanager
def interpreter_installed() -> Iterator[None]:
    """Triton takes its interpreter for a backend named "cpu"."""
    import triton
    from triton.backends import backends

    backend = _interpreter()
    with patch.dict(backends, {"cpu": backend}):
        triton.runtime.driver.set_active(backend.driver())
        yield


@functools.cache
def _interpreter() -> Any:
    """The backend."""
    from triton._C.libtriton import ir, passes
    from triton.backends import Backend
    from triton.backends.compiler import BaseBackend, GPUTarget
    from triton.backends.driver import DriverBase

    class InterpreterDriver(DriverBase):
        utils = _Utils()
        launcher_cls = _Launcher

        @classmethod
        def is_active(cls) -> bool:
            return True

        def map_python_to_cpp_type(self, ty: str) -> str:
            return ty

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cpu", 0, 0)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

        def get_benchmarker(self) -> Callable[..., Any]:
            raise NotImplementedError("nothing is measured in an interpreter")

    class InterpreterBackend(BaseBackend):
        def __init__(self, target: GPUTarget) -> None:
            super().__init__(target)
            self.binary_ext = "ttir"

        @staticmethod
        def supports_target(target: GPUTarget) -> bool:
            return target.backend == "cpu"

        def hash(self) -> str:
            return "interpreter"

        def parse_options(self, options: dict[str, Any]) -> _Options:
            names = {field.name for field in dataclasses.fields(_Options)}
            return _Options(**{name: value for name, value in options.items() if name in names})

        def add_stages(self, stages: dict[str, Any], options: _Options, language: Any = None) -> None:
            def make_ttir(module: Any, metadata: dict[str, Any]) -> Any:
                manager = ir.pass_manager(module.context)
                passes.common.add_inliner(manager)
                manager.run(module, "make_ttir")
                metadata.update(shared=0, name=module.get_entry_func_name())
                return module

            stages["ttir"] = make_ttir

        def load_dialects(self, context: Any) -> None:
            pass

        def get_module_map(self) -> dict[str, Any]:
            from triton.language.extra.cuda import libdevice

            return {"triton.language.extra.libdevice": libdevice}

        def get_codegen_implementation(self, options: _Options) -> dict[str, Any]:
            return {"min_dot_size": lambda left, right: (1, 1, 1)}

        def pack_metadata(self, metadata: Any) -> Any:
            return metadata

    return Backend(InterpreterBackend, InterpreterDriver)


class _Utils:
    """The driver loads nothing."""

    def load_binary(self, *args: Any) -> tuple[None, None, int, int, int]:
        return None, None, 0, 0, 1024

    def unload_module(self, module: Any) -> None:
        pass

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 0}


class _Launcher:
    """Runs a compiled kernel: its Python, in the interpreter."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.function = source.fn
        self.constants = {self.function.arg_names[index]: value for (index,), value in source.constants.items()}

    def __call__(self, x: int, y: int, z: int, *args: Any) -> None:
        from triton.runtime.interpreter import InterpretedFunction

        stream_and_hooks = 6
        values = dict(zip(self.function.arg_names, args[stream_and_hooks:]))
        with interpreting(_Memory(values.values())):
            InterpretedFunction(self.function.fn)[x, y, z](**{**values, **self.constants})


class _Memory:
    """What a kernel reads and writes memory with, in place of the interpreter's own: it refuses what is outside of the
    kernel's tensors."""

    def __init__(self, arguments: Iterable[Any]) -> None:
        storages = [value.untyped_storage() for value in arguments if isinstance(value, torch.Tensor)]
        self.ranges = [(storage.data_ptr(), storage.data_ptr() + storage.nbytes()) for storage in storages]

    def __getattr__(self, name: str) -> Any:
        from triton._C.libtriton import interpreter

        return getattr(interpreter, name)

    def _check(self, pointers: np.ndarray, mask: np.ndarray, itemsize: int) -> None:
        used = pointers[mask].astype(np.int64)
        inside = np.zeros(used.shape, dtype=bool)
        for begin, end in self.ranges:
            inside |= (used >= begin) & (used + itemsize <= end)
        assert inside.all(), "a kernel reads or writes outside of its tensors"

    def load(self, pointers: np.ndarray, mask: np.ndarray, other: np.ndarray, dtype: np.dtype) -> np.ndarray:
        self._check(pointers, mask, np.dtype(dtype).itemsize)
        return self.__getattr__("load")(pointers, mask, other, dtype)

    def store(self, pointers: np.ndarray, values: np.ndarray, mask: np.ndarray) -> None:
        self._check(pointers, mask, values.itemsize)
        self.__getattr__("store")(pointers, values, mask)

    def atomic_rmw(
        self, operation: Any, pointers: np.ndarray, values: np.ndarray, mask: np.ndarray, order: Any
    ) -> np.ndarray:
        self._check(pointers, mask, values.itemsize)
        return self.__getattr__("atomic_rmw")(operation, pointers, values, mask, order)


@contextlib.contextmanager
def interpreting(memory: Any) -> Iterator[None]:
    """Kernels may call other functions of Triton, and those of libdevice, and multiply in bfloat16."""
    import triton.language as tl
    from triton.language.extra import libdevice
    from triton.runtime import interpreter
    from triton.runtime.jit import JITFunction

    def call(function: JITFunction, *args: Any, **kwargs: Any) -> Any:
        return interpreter.InterpretedFunction(function.fn).rewrite()(*args, **kwargs)

    # Once for all functions that a kernel calls: the interpreter would do it, and not undo it, for each call.
    scope = interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    dot = functools.partialmethod(_dot, interpreter.InterpreterBuilder.create_dot)
    without_overflow = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    try:
        with (
            patch.object(JITFunction, "__call__", call),
            patch.object(interpreter.InterpreterBuilder, "create_dot", dot),
            patch.object(interpreter.interpreter_builder, "options", without_overflow),
            patch.object(interpreter, "_interpreter", memory),
            patch.multiple(libdevice, **_libdevice()),
        ):
            yield
    finally:
        scope.restore()


def _dot(builder: Any, original: Callable[..., Any], a: Any, b: Any, *rest: Any) -> Any:
    """A product of matrices; the interpreter takes the bits of bfloat16 for integers."""
    import triton.language as tl

    if a.dtype == tl.bfloat16:
        a, b = (builder.cast_impl(matrix, tl.float32) for matrix in (a, b))
    return original(builder, a, b, *rest)


# What Inductor's code calls of libdevice, of which the interpreter has nothing, and what torch calls the same.
_LIBDEVICE = {
    **{name: name for name in ("ceil", "cos", "exp", "exp2", "floor", "fmod", "log", "log2", "pow", "rsqrt", "sin")},
    **{name: name for name in ("erf", "isinf", "isnan", "sqrt", "tanh", "trunc")},
    "nearbyint": "round",
}


@functools.cache
def _libdevice() -> dict[str, Callable[..., Any]]:
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle, interpreter_semantic

    def interpreted(function: Callable[..., torch.Tensor]) -> Callable[..., Any]:
        def call(*args: Any) -> tl.tensor:
            operands = [interpreter_semantic.to_tensor(arg) for arg in args]
            values = function(*(torch.from_numpy(operand.handle.data) for operand in operands))
            dtype = operands[0].dtype
            if values.dtype == torch.bool:  # libdevice has integers
                values, dtype = values.int(), tl.int32
            shape = list(values.shape)
            return tl.tensor(TensorHandle(values.numpy(), dtype), tl.block_type(dtype, shape) if shape else dtype)

        return call

    return {name: interpreted(getattr(torch, same)) for name, same in _LIBDEVICE.items()}


# How tests run on the backends that there are


BACKENDS = ("interpreter", "triton-cpu", "cuda")


TRITON_IS_MISSING = "Triton is not installed: pip install the one that goes with this torch"


def triton_or_skip() -> ModuleType:
    return pytest.importorskip("triton", reason=TRITON_IS_MISSING)


@contextlib.contextmanager
def active(backend: str) -> Iterator[torch.device]:
    """Triton uses one of ``BACKENDS``; the device that its kernels run on.

    Skips the test where it is not to be had.
    """
    triton = triton_or_skip()
    driver = triton.runtime.driver
    as_before = patch.object(driver, "_active", driver._active)  # afterwards
    with as_before, _active(backend) as device:
        yield device


@contextlib.contextmanager
def _active(backend: str) -> Iterator[torch.device]:
    import triton
    from torch._inductor.runtime import triton_helpers

    _forget_kernels()
    if backend == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("there is no CUDA device")
        triton_helpers.set_driver_to_gpu()
        yield torch.device("cuda")
    elif backend == "triton-cpu":
        if not is_compiled_for_cpu():
            pytest.skip("Triton-CPU is not installed")
        triton_helpers.set_driver_to_cpu()
        yield torch.device("cpu")
    else:
        if is_compiled_for_cpu():
            pytest.skip("Triton-CPU is installed: what would be interpreted is compiled")
        if TorchVersion(triton.__version__) < (3, 7):
            pytest.skip(f"the interpreter of Triton {triton.__version__} does not work with this NumPy")
        with interpreter_installed():
            yield torch.device("cpu")


def _forget_kernels() -> None:
    """Triton keeps what it compiled by the number of the device, which the CPU and the first GPU share."""
    from triton.runtime.jit import JITFunction

    for name, module in list(sys.modules.items()):
        if name.startswith("inductor_vision.lowering.triton."):
            for value in vars(module).values():
                if isinstance(value, JITFunction):
                    value.device_caches.clear()


def moved(value: Any, device: torch.device) -> Any:
    """Arguments of an operator, with tensors moved to a device."""
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf, value)


def run_program(op: str, arguments: Any, device: torch.device) -> Any:
    """What an operator's program with Triton kernels computes, without Inductor, from arguments on the CPU."""
    from inductor_vision.lowering.common.registry import _triton_program
    from inductor_vision.ops.registry import OPS

    program = _triton_program(OPS[op])
    assert program is not None, f"{op} has no Triton program"
    arguments = moved(arguments, device)
    assert program.refusal(*arguments) is None
    return moved(program.program(*arguments), torch.device("cpu"))


@contextlib.contextmanager
def launched_kernels() -> Iterator[list[str]]:
    """The names of the Triton kernels that compiled code launches inside the ``with`` block."""
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    names: list[str] = []

    def run(autotuner: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(autotuner.fn.__name__)
        return original(autotuner, *args, **kwargs)

    original = CachingAutotuner.run
    with patch.object(CachingAutotuner, "run", run):
        yield names


@contextlib.contextmanager
def interpreted_sources() -> Iterator[list[Any]]:
    """The kernels that are loaded for the interpreter inside the ``with`` block, as Triton compiles them."""
    sources: list[Any] = []

    def init(launcher: _Launcher, source: Any, metadata: Any) -> None:
        sources.append(source)
        original(launcher, source, metadata)

    original = _Launcher.__init__
    with patch.object(_Launcher, "__init__", init):
        yield sources
