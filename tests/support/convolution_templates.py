"""What the tests of compiled convolutions have in common, where each compiles many calls in one graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pytest
import torch
from inductor_vision.tests.support.compare import assert_close
from inductor_vision.tests.support.compiled import Compiled, compile_and_run
from inductor_vision.tests.support.convolution import Function, Sample, gradient_like
from inductor_vision.tests.support.layouts import strides_of
from torch import Tensor, nn
from torch._ops import OpOverload


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of an operator, which a subclass names, or of its backward.

    Attributes:
        function: the operator's public function.
        gradients: the operator of its gradients.
        oracle: what computes the values of a sample.
        gradient_oracle: what computes the gradients of a sample's tensors, by their names, of the result's gradient.
        wanted: which gradients; None: it is the forward pass.
    """

    function: ClassVar[Function]
    gradients: ClassVar[OpOverload]
    oracle: ClassVar[Callable[[Any], Tensor]]
    gradient_oracle: ClassVar[Callable[[Any, Tensor], dict[str, Tensor]]]

    sample: Sample
    wanted: tuple[str, ...] | None = None

    def __str__(self) -> str:
        wanted = "" if self.wanted is None else f"-gradients-of-{'-'.join(self.wanted)}"
        return f"{self.sample.name}-{str(self.dtype)[6:]}{wanted}"

    @property
    def dtype(self) -> torch.dtype:
        return self.sample.args[0].dtype

    @property
    def grad(self) -> Tensor:
        return gradient_like(torch.empty(self.sample.case.out_shape, dtype=self.dtype))

    @property
    def backward(self) -> tuple[Any, ...]:
        """The arguments of the backward operator."""
        return (self.grad, *self.sample.positional, [name in (self.wanted or ()) for name in self.sample.names])

    @property
    def kernels(self) -> list[tuple[str, str]]:
        """For each kernel that it compiles to, the operator and what is said of it."""
        raise NotImplementedError

    def assert_right(self, result: Any) -> None:
        """What the oracle gives, laid out as eagerly; a gradient that is not wanted is empty."""
        s = self.sample
        if self.wanted is None:
            eager = self.function(*s.args, **s.kwargs)
            assert result.dtype == self.dtype
            assert strides_of(result) == strides_of(eager), str(self)
            assert_close(result, self.oracle(s), self.dtype, str(self))
            return
        expected = self.gradient_oracle(s, self.grad)
        for name, values, eager in zip(s.names, result, self.gradients(*self.backward)):
            assert values.dtype == self.dtype
            assert values.shape == eager.shape and strides_of(values) == strides_of(eager), f"{self}: {name}"
            if name in self.wanted and name in expected:
                assert_close(values, expected[name].reshape(values.shape), self.dtype, f"{self}: gradient of {name}")
            else:
                assert values.numel() == 0


def compute(calls: Sequence[Call], **options: Any) -> Compiled:
    """All calls in one graph and one source file, which takes little longer to compile than one of them."""
    function, gradients = calls[0].function, calls[0].gradients

    def run(forward: dict[int, Any], backward: dict[int, Any]) -> dict[int, Any]:
        results = {i: function(*args, **kwargs) for i, (args, kwargs) in forward.items()}
        return results | {i: gradients(*arguments) for i, arguments in backward.items()}

    forward = {i: (call.sample.args, call.sample.kwargs) for i, call in enumerate(calls) if call.wanted is None}
    backward = {i: call.backward for i, call in enumerate(calls) if call.wanted is not None}
    with torch.no_grad():
        return compile_and_run(run, forward, backward, config={"cpp_wrapper": True, **options})


def assert_takes_templates(compiled: Compiled, calls: Sequence[Call]) -> None:
    """Each call, and by those that are meant for it."""
    expected = [kernel for call in calls for kernel in call.kernels]
    assert sorted((path.op, path.detail) for path in compiled.paths) == sorted(expected)
    assert compiled.kinds == ["template"] * len(expected)
    assert compiled.templates == len(expected)


def assert_all_right(compiled: Compiled, calls: Sequence[Call]) -> None:
    for i, call in enumerate(calls):
        call.assert_right(compiled.result[i])


class Blocks(nn.Module):
    """Blocks, each of a convolution and what follows it, that return the convolution's own result and the block's: of
    some only the latter is used.

    Args:
        block: makes one, whose ``reference`` computes both in float64.
        inputs: of each memory layout the name, and an input in it.
    """

    def __init__(self, block: Callable[[], nn.Module], inputs: dict[str, Tensor]) -> None:
        super().__init__()
        self.kinds = [(own, layout) for own in (False, True) for layout in inputs]
        self.blocks = nn.ModuleList(block() for _ in self.kinds)
        self.calls = [inputs[layout].clone() for _, layout in self.kinds]

    def forward(self, calls: list[Tensor]) -> list[tuple[Tensor, ...]]:
        results = [block(call) for block, call in zip(self.blocks, calls)]
        return [result if own else result[1:] for result, (own, _) in zip(results, self.kinds)]


def assert_all_is_fused(network: Blocks) -> None:
    """Frozen, so that all generated code is the templates'."""
    with torch.no_grad():
        compiled = compile_and_run(network, network.calls, config={"freezing": True, "cpp_wrapper": True})
        assert compiled.templates == compiled.fused == compiled.kernels == len(network.kinds)
        for kind, block, call, results in zip(network.kinds, network.blocks, network.calls, compiled.result):
            expected = block.reference(call)
            for result, values in zip(results, expected if kind[0] else expected[1:]):
                assert_close(result, values, torch.float32, str(kind))
                assert result.stride() == call.stride()


def flat(results: Any) -> list[Tensor]:
    """What an epilogue returned, be it one tensor or several."""
    return list(results) if isinstance(results, (tuple, list)) else [results]


def assert_same_errors(function: Function, calls: Sequence[Sample]) -> None:
    """A call that is refused eagerly is refused in the same words when it is compiled."""
    for wrong in calls:
        with pytest.raises(RuntimeError) as eager:
            function(*wrong.args, **wrong.kwargs)
        with pytest.raises(RuntimeError) as compiled:
            compile_and_run(lambda wrong=wrong: function(*wrong.args, **wrong.kwargs))
        assert str(eager.value).startswith(f"{function.__name__}: ")
        assert str(eager.value) in str(compiled.value)
