"""Which convolutions a model computes, on what, for whom, and for how long: seen in one run of it."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..perf.interleaving import time_call
from .target import Program

# In inference mode these reach a dispatch mode before PyTorch has turned them into aten.convolution.
_COMPOSITE = {f"aten::conv{way}{d}d" for way in ("", "_transpose") for d in (1, 2, 3)} | {"aten::_convolution_mode"}
_FEWEST_RUNS = 3


@dataclasses.dataclass(frozen=True)
class Form:
    """All of a tensor but its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Form:
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype)

    def random(self) -> Tensor:
        """Normally distributed, the same each time; elements share memory where those of the model do."""
        elements = 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.stride))
        values = torch.randn(max(elements, 0), generator=torch.Generator().manual_seed(0)).to(self.dtype)
        return values.as_strided(self.shape, self.stride)

    @property
    def is_channels_last(self) -> bool:
        """Only so: a tensor of one channel or one pixel is contiguous as well."""
        tensor = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")
        return (
            tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
        )

    def __str__(self) -> str:
        layout = ["channels_last"] if self.is_channels_last else []
        dtype = [] if self.dtype == torch.float32 else [str(self.dtype).removeprefix("torch.")]
        return " ".join(["x".join(map(str, self.shape)), *dtype, *layout])


@dataclasses.dataclass(frozen=True)
class Signature:
    """What the time of a convolution depends on: two calls that agree in it are of the same layer of the report.

    ``arguments`` are those of the operator, with a :class:`Form` in place of each tensor.
    """

    operator: str
    arguments: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Layer:
    """One distinct convolution of a model.

    Attributes:
        kind: "plain", "pointwise", "grouped", "depthwise", "transposed", "1-D", "3-D", "deformable", "patches" or
            "depthwise separable".
        arguments: of its first call, but for the input, in whose place its :class:`Form` is.
        names: the modules that compute it, in the order of their first calls.
        swappable: those of them that compute nothing else, so that another module may take their place; each by all of
            the names that it has.
        calls: how often it is computed in one run of the model.
        seconds: what these calls take within the model, in one run.
    """

    signature: Signature
    kind: str
    arguments: tuple[Any, ...]
    names: tuple[str, ...]
    swappable: tuple[str, ...]
    calls: int
    seconds: float

    @property
    def input(self) -> Form:
        return self.arguments[0]

    @property
    def weight(self) -> Form:
        return self.signature.arguments[_weight_at(self.signature.operator)]

    @property
    def is_convolution(self) -> bool:
        """PyTorch's own, of whatever kind."""
        return self.signature.operator == "aten::convolution"

    def describe(self) -> str:
        """Kind, kernel and channels; what else is not as usual."""
        outputs, of_group, *kernel = self.weight.shape
        text = f"{self.kind} {'x'.join(map(str, kernel))}"
        if not self.is_convolution:
            if self.kind == "depthwise separable":
                outputs = self.signature.arguments[2].shape[0]
            return f"{text}, {self.input.shape[-3]} -> {outputs}"
        _, _, _, stride, _, dilation, transposed, _, groups = self.arguments
        outputs = of_group * groups if transposed else outputs
        text += f", {self.input.shape[1]} -> {outputs}"
        text += f", stride {stride[0]}" if max(stride) > 1 else ""
        text += f", dilation {dilation[0]}" if max(dilation) > 1 else ""
        return text + (f", {groups} groups" if groups > 1 and self.kind != "depthwise" else "")


@dataclasses.dataclass(frozen=True)
class Capture:
    """What a run of a model showed.

    Attributes:
        layers: by the time that they take, longest first.
        seconds: of one run of the model.
        calls_torchvision: it calls operators of torchvision's compiled library.
        has_separable: a depthwise convolution is followed by a pointwise one on its result.
        has_winograd: a convolution is one of 3 x 3 without stride and dilation.
    """

    layers: tuple[Layer, ...]
    seconds: float
    calls_torchvision: bool
    has_separable: bool
    has_winograd: bool

    def share(self, layer: Layer) -> float:
        """The part of the model's time that a layer takes. What the clocks disagree on is left out of the sum."""
        return layer.seconds / max(self.seconds, sum(other.seconds for other in self.layers))


def capture(program: Program, seconds: float, say: Callable[[str], None]) -> Capture:
    """Run the model, watched, and then for so many seconds again, plainly and with its convolutions timed in turn."""
    with _calling_modules(program.model) as stack:
        recorder = _Recorder(stack)
        with recorder:
            program.run()
        plain, timed = [], []
        deadline = time.perf_counter() + seconds
        while time.perf_counter() < deadline or len(plain) < _FEWEST_RUNS:
            say(f"run {len(plain) + 1}")
            plain.append(time_call(program.run))
            again = _Recorder(stack)
            with again:
                program.run()
            timed.append(again.seconds())
    layers = [
        _layer(program.model, calls, statistics.median(run.get(signature, 0.0) for run in timed))
        for signature, calls in recorder.by_signature().items()
    ]
    return Capture(
        tuple(sorted(layers, key=lambda layer: -layer.seconds)),
        statistics.median(plain),
        recorder.calls_torchvision,
        _has_separable(recorder.calls),
        any(_is_for_winograd(call.signature) for call in recorder.calls),
    )


@dataclasses.dataclass(frozen=True)
class _Call:
    signature: Signature
    module: str
    output: tuple[int, ...]
    seconds: float
    arguments: tuple[Any, ...]


class _Recorder(TorchDispatchMode):
    """Watches every operator, at the level where all convolutions of PyTorch are one."""

    def __init__(self, stack: list[str]) -> None:
        super().__init__()
        self.stack = stack
        self.calls: list[_Call] = []
        self.calls_torchvision = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.name() if isinstance(func, torch._ops.OpOverload) else ""
        if name.partition(".")[0] in _COMPOSITE:
            with self:
                return func.decompose(*args, **kwargs)
        self.calls_torchvision |= name.startswith("torchvision::")
        if not _is_convolution(name):
            return func(*args, **kwargs)
        start = time.perf_counter()
        output = func(*args, **kwargs)
        seconds = time.perf_counter() - start
        arguments = tuple(tuple(a) if isinstance(a, list) else a for a in args)
        forms = tuple(Form.of(a) if isinstance(a, Tensor) else a for a in arguments)
        self.calls.append(
            _Call(
                Signature(name, forms),
                self.stack[-1] if self.stack else "",
                tuple(output.shape),
                seconds,
                (forms[0], *arguments[1:]),  # the input may be large, and any will do
            )
        )
        return output

    def by_signature(self) -> dict[Signature, list[_Call]]:
        groups: dict[Signature, list[_Call]] = {}
        for call in self.calls:
            groups.setdefault(call.signature, []).append(call)
        return groups

    def seconds(self) -> dict[Signature, float]:
        return {signature: sum(call.seconds for call in calls) for signature, calls in self.by_signature().items()}


def _is_convolution(name: str) -> bool:
    """PyTorch's, torchvision's deformable one, and this package's."""
    if name in ("aten::convolution", "torchvision::deform_conv2d"):
        return True
    return name.startswith("inductor_vision::") and name.endswith("conv2d")


def _weight_at(operator: str) -> int:
    """Which argument the weight is."""
    return 2 if operator == "inductor_vision::deform_conv2d" else 1


@contextlib.contextmanager
def _calling_modules(model: nn.Module) -> Iterator[list[str]]:
    """The names of the modules whose forward is running, the innermost last."""
    names = {module: name for name, module in model.named_modules()}
    stack: list[str] = []

    def enter(module: nn.Module, inputs: Any) -> None:
        stack.append(names.get(module, stack[-1] if stack else ""))  # one made on the fly has no name

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        stack.pop()

    handles = (
        nn.modules.module.register_module_forward_pre_hook(enter),
        nn.modules.module.register_module_forward_hook(leave, always_call=True),
    )
    try:
        yield stack
    finally:
        for handle in handles:
            handle.remove()


def _layer(model: nn.Module, calls: Sequence[_Call], seconds: float) -> Layer:
    names = tuple(dict.fromkeys(call.module for call in calls))
    found = [model.get_submodule(name) for name in names if name]
    layers = [module for module in found if _is_layer(module)]
    return Layer(
        calls[0].signature,
        _kind(calls[0].signature),
        calls[0].arguments,
        names,
        tuple(name for name, module in model.named_modules(remove_duplicate=False) if any(m is module for m in layers)),
        len(calls),
        seconds,
    )


def _kind(signature: Signature) -> str:
    _, _, name = signature.operator.partition("::")
    if name != "convolution":
        special = {"deform_conv2d": "deformable", "patch_conv2d": "patches"}
        return special.get(name, name.removesuffix("_conv2d").replace("_", " "))
    input, weight, *_, transposed, _, groups = signature.arguments
    dimensions = len(weight.shape) - 2
    if transposed:
        return "transposed"
    if dimensions != 2:
        return f"{dimensions}-D"
    if groups == 1:
        return "pointwise" if weight.shape[2:] == (1, 1) else "plain"
    return "depthwise" if groups == input.shape[1] else "grouped"


def _is_layer(module: nn.Module) -> bool:
    """It computes as nn.Conv2d, torchvision's DeformConv2d or a layer of this package, not in a way of its own that
    inherits from them."""
    forward = type(module).forward
    if forward is nn.Conv2d.forward:
        return type(module)._conv_forward is nn.Conv2d._conv_forward
    ours = type(module).__module__.startswith("inductor_vision.ops.")
    return ours or f"{forward.__module__}.{forward.__qualname__}" == "torchvision.ops.deform_conv.DeformConv2d.forward"


def _has_separable(calls: Sequence[_Call]) -> bool:
    """Squeeze-and-excitation, on one pixel, may come in between."""
    for i, call in enumerate(calls):
        if _kind(call.signature) != "depthwise":
            continue
        same = (c for c in calls[i + 1 :] if c.signature.arguments[0].shape == call.output)
        following = next(same, None)
        if following and _kind(following.signature) == "pointwise":
            return True
    return False


def _is_for_winograd(signature: Signature) -> bool:
    if _kind(signature) not in ("plain", "grouped"):
        return False
    _, weight, _, stride, _, dilation, *_ = signature.arguments
    return tuple(weight.shape[2:]) == (3, 3) and {*stride, *dilation} == {1}
