"""Ways to run a model that any suite's contenders can use: Inductor, AOTInductor, ONNX Runtime, OpenVINO.

Models run on the CPU, or where :func:`placed_on` says.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .spec import Contender, Job, Prepared, Unavailable
from .verify import tensors


def needs(*modules: str) -> Callable[[], None]:
    """A contender's ``check``: it needs these modules."""

    def check() -> None:
        for module in modules:
            try:
                importlib.import_module(module)
            except ModuleNotFoundError as error:
                raise Unavailable(f"{error.name} is not installed") from error
            except Exception as error:  # a broken installation raises whatever it likes
                raise Unavailable(f"{module} does not load: {error}") from error

    return check


def needs_torchvision() -> None:
    """A contender's ``check``: torchvision with its compiled operators."""
    needs("torchvision")()
    import torchvision

    if not torchvision.extension._has_ops():
        raise Unavailable("torchvision does not load its compiled operators beside this torch")


def needs_triton_cpu() -> None:
    """A contender's ``check``: a Triton that compiles for the CPU."""
    needs("triton")()
    from triton.backends import backends

    if "cpu" not in backends:
        raise Unavailable("Triton-CPU is not installed, see docs/backends.md")


def needs_cuda() -> None:
    """A contender's ``check``: a CUDA device, and a Triton that compiles for it."""
    if not torch.cuda.is_available():
        raise Unavailable("there is no CUDA device")
    needs("triton")()


_device: contextvars.ContextVar[str] = contextvars.ContextVar("device", default="cpu")


@contextlib.contextmanager
def placed_on(device: str) -> Iterator[None]:
    """Models that are prepared meanwhile, and their arguments, are on this device."""
    token = _device.set(device)
    try:
        yield
    finally:
        _device.reset(token)


_options: contextvars.ContextVar[dict[str, Any] | None] = contextvars.ContextVar("options", default=None)


@contextlib.contextmanager
def compiled_with(**options: Any) -> Iterator[None]:
    """Models that are prepared meanwhile are compiled with these options of Inductor."""
    token = _options.set(options)
    try:
        yield
    finally:
        _options.reset(token)


def _compile(module: nn.Module, options: dict[str, Any], **settings: Any) -> Any:
    """``torch.compile`` with options of Inductor. Dynamo looks up what it compiled before by these, but not by the
    configuration, and contenders may share code objects."""
    return torch.compile(module, options={**options, **(_options.get() or {})}, **settings)


def placed(value: Any) -> Any:
    """A tensor or module where models are prepared for, and sequences of them."""
    if isinstance(value, (Tensor, nn.Module)):
        return value.to(_device.get())
    return [placed(part) for part in value] if isinstance(value, (tuple, list)) else value


def prepared(call: Callable[[], Any]) -> Prepared:
    """A model, ready to be timed where it runs: on a CUDA device by events on its stream."""
    output = call()
    if _device.get() != "cuda":
        return Prepared(call, output)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in "12")

    def seconds() -> float:
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000

    def memory() -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = call()
        torch.cuda.synchronize()
        returned = sum(tensor.nbytes for tensor in tensors(kept))
        return max(0, torch.cuda.max_memory_allocated() - before - returned)

    return Prepared(call, [tensor.cpu() for tensor in tensors(output)], seconds=seconds, memory=memory)


def with_triton(*contenders: Contender) -> tuple[Contender, ...]:
    """These, and "ours-compiled" as Triton code too: on the CPU, by Triton-CPU, and on a CUDA device, where torchvision
    is a peer if it is one here."""
    by_name = {contender.name: contender for contender in contenders}
    ours, theirs = by_name["ours-compiled"], by_name.get("torchvision")
    as_triton, on_cuda = (functools.partial(run, ours.prepare) for run in (_as_triton, _on_cuda))
    more = [
        Contender("ours-triton-cpu", "ours", as_triton, needs_triton_cpu, compiled=True),
        Contender("ours-cuda", "ours", on_cuda, needs_cuda, compiled=True),
    ]
    if theirs:

        def check() -> None:
            needs_cuda()
            needs_torchvision()

        more.append(Contender("torchvision-cuda", "peer", functools.partial(_on_cuda, theirs.prepare), check))
    return (*contenders, *more)


def _as_triton(prepare: Callable[[Job], Prepared], job: Job) -> Prepared:
    with compiled_with(cpu_backend="triton"):
        return prepare(job)


def _on_cuda(prepare: Callable[[Job], Prepared], job: Job) -> Prepared:
    with placed_on("cuda"):
        return prepare(job)


def only_float32(dtype: torch.dtype, who: str) -> None:
    """For a contender that has no kernel for anything else."""
    if dtype != torch.float32:
        raise Unavailable(f"{who} has no kernel for {dtype} on the CPU")


class Function(nn.Module):
    """A function of tensors as a module, which is what :func:`compiled` and :func:`packaged` take."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: Tensor) -> Any:
        return self.function(*tensors)


class Autocast(nn.Module):
    """A module that computes in a low precision, where autocast has it do so."""

    def __init__(self, module: nn.Module, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.module, self.dtype = module, dtype
        self.training = module.training  # its own alone: train() would change what is in it, too

    def forward(self, *inputs: Any) -> Any:
        with torch.autocast("cpu", dtype=self.dtype):
            return self.module(*inputs)


class Holding(nn.Module):
    """A function that holds some of its arguments as parameters, as models hold weights: constants to a compiler that
    freezes. It is called with the other tensors among its arguments, in their order."""

    def __init__(self, function: Callable[..., Any], arguments: Sequence[Any], held: Sequence[int]) -> None:
        super().__init__()
        self.function = function
        self.held = [i for i in held if arguments[i] is not None]
        self.free = [i for i, value in enumerate(arguments) if isinstance(value, Tensor) and i not in held]
        self.others = [None if isinstance(value, Tensor) else value for value in arguments]
        for i in self.held:
            self.register_parameter(f"argument_{i}", nn.Parameter(arguments[i], requires_grad=False))

    def inputs_among(self, arguments: Sequence[Any]) -> list[Tensor]:
        """What it is called with."""
        return [arguments[i] for i in self.free]

    def forward(self, *inputs: Tensor) -> Any:
        arguments = list(self.others)
        for i, tensor in zip(self.free, inputs):
            arguments[i] = tensor
        for i in self.held:
            arguments[i] = getattr(self, f"argument_{i}")
        return self.function(*arguments)


def eager(function: Callable[..., Any], arguments: Sequence[Any]) -> Prepared:
    """Call it as it is, without autograd."""
    function, arguments = placed(function), placed(arguments)

    def call() -> Any:
        with torch.no_grad():
            return function(*arguments)

    return prepared(call)


def copy(bytes_moved: int) -> Prepared:
    """Move so many bytes: read half of them and write the other half, into memory that is there already."""
    source = torch.ones(bytes_moved // 2, dtype=torch.uint8)
    return eager(torch.ones_like(source).copy_, (source,))


def compiled(
    module: nn.Module,
    arguments: Sequence[Tensor],
    *,
    dynamic: bool | None = None,
    freezing: bool = True,
    fullgraph: bool = True,
) -> Prepared:
    """``torch.compile`` for inference, the module's parameters being constants to the compiler under ``freezing``.

    That is asked for by the configuration: as an option of ``torch.compile`` it comes too late for Dynamo, which has
    made inputs of parameters by then.

    Falling back to eager mode, for whatever reason, is an error: it would be timed as compiled code. Without
    ``fullgraph``, parts may.
    """
    import torch._dynamo
    import torch._inductor.config

    program = _compile(placed(module).eval(), {"freezing": freezing}, fullgraph=fullgraph, dynamic=dynamic)
    arguments = placed(arguments)

    def call() -> Any:
        with torch.no_grad():
            return program(*arguments)

    with (
        torch._dynamo.config.patch(fail_on_recompile_limit_hit=fullgraph),
        torch._inductor.config.patch(freezing=freezing),
    ):
        return prepared(call)


def gradients(
    function: Callable[..., Tensor], leaves: Sequence[Tensor], grad: Tensor, *, compile: bool, step: bool = False
) -> Prepared:
    """Have autograd compute the gradients of a function of ``leaves``, with ``grad`` that of its result.

    Args:
        step: the result is computed each time, and not once beforehand.
    """
    from torch._functorch import config

    module, grad = placed(Function(function)), placed(grad)
    leaves = [tensor.detach().requires_grad_() for tensor in placed(leaves)]
    program = _compile(module, {}, fullgraph=True) if compile else module
    keeps_graph = config.patch(donated_buffer=step)  # when compiled and when called
    with keeps_graph:
        result = program(*leaves)

    @keeps_graph
    def call() -> tuple[Tensor, ...]:
        out = program(*leaves) if step else result
        return torch.autograd.grad(out, leaves, grad, retain_graph=not step)

    return prepared(call)


def packaged(module: nn.Module, arguments: Sequence[Tensor]) -> Prepared:
    """An AOTInductor package, written to disk and loaded back."""
    import torch._inductor.config

    with torch.no_grad(), tempfile.TemporaryDirectory(prefix="inductor_vision_perf_") as folder:
        program = torch.export.export(module.eval(), tuple(arguments))
        with torch._inductor.config.patch(freezing=True):
            path = torch._inductor.aoti_compile_and_package(program, package_path=str(Path(folder, "model.pt2")))
        model = torch._inductor.aoti_load_package(path)
    return eager(model, arguments)


def onnx_model(
    nodes: Sequence[Any],
    feeds: dict[str, Tensor],
    opset: int,
    constants: dict[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> bytes:
    """An ONNX model of these nodes, the last of which has a single output of a dtype."""
    from onnx import helper, numpy_helper

    inputs = [helper.make_tensor_value_info(name, _onnx_type(tensor), tensor.shape) for name, tensor in feeds.items()]
    output = helper.make_tensor_value_info(nodes[-1].output[0], _onnx_type(torch.empty(0, dtype=dtype)), None)
    initializers = [numpy_helper.from_array(tensor.numpy(), name) for name, tensor in (constants or {}).items()]
    graph = helper.make_graph(list(nodes), nodes[-1].op_type, inputs, [output], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    return model.SerializeToString()


def _onnx_type(tensor: Tensor) -> int:
    from onnx import helper

    return helper.np_dtype_to_tensor_dtype(tensor.numpy().dtype)


def onnxruntime(model: bytes | str, feeds: dict[str, Tensor], threads: int) -> Prepared:
    """An ONNX model, or a file with one, on ONNX Runtime's CPU provider."""
    import onnxruntime as ort

    arrays = {name: tensor.numpy() for name, tensor in feeds.items()}

    def session_call(*, arena: bool) -> Callable[[], Any]:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.enable_cpu_mem_arena = arena
        options.log_severity_level = 3
        try:
            session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions have no public base class
            raise Unavailable(f"ONNX Runtime does not take it: {str(error).splitlines()[0]}") from error
        return lambda: session.run(None, arrays)

    call = session_call(arena=True)
    output = [torch.as_tensor(array) for array in call()]
    return Prepared(call, output, lean=functools.partial(session_call, arena=False))


_OPENVINO_PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16"}


def openvino(model: Any, feeds: Sequence[Tensor], threads: int, dtype: torch.dtype | None = torch.float32) -> Prepared:
    """An OpenVINO model, or a file with an ONNX model, on OpenVINO's CPU plugin, inputs and outputs shared rather than
    copied.

    ``dtype`` is that of the computation. None leaves it to OpenVINO, which computes float32 models in bfloat16 where
    the processor can. Inputs and outputs are of the types that the model gives them, bfloat16 among them.
    """
    import openvino as ov

    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    if dtype is not None:
        settings["INFERENCE_PRECISION_HINT"] = _OPENVINO_PRECISIONS[dtype]
    program = ov.Core().compile_model(model, "CPU", settings)
    request = program.create_infer_request()
    arrays = [_to_openvino(tensor) for tensor in feeds]

    def call() -> Any:
        return request.infer(arrays, share_inputs=True, share_outputs=True)

    def lean() -> Callable[[], Any]:
        program.release_memory()
        return lambda: program.create_infer_request().infer(arrays, share_inputs=True, share_outputs=True)

    return Prepared(call, [_from_openvino(port, array) for port, array in call().items()], lean=lean)


def _to_openvino(tensor: Tensor) -> Any:
    import openvino as ov

    if tensor.dtype != torch.bfloat16:
        return tensor.numpy()
    return ov.Tensor(tensor.view(torch.int16).numpy(), list(tensor.shape), ov.Type.bf16)  # NumPy has no such type


def _from_openvino(port: Any, array: Any) -> Tensor:
    """An output; bfloat16 comes as float16 with the same bits."""
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if port.get_element_type().to_string() == "bf16" else tensor
