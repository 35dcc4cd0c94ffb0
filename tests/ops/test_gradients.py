"""What is derived from the declaration of a gradient, on operators that are declared for it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from inductor_vision.ops import registry
from inductor_vision.ops.gradients import Gradient, parse_schema
from inductor_vision.ops.registry import GRADIENTS, NAMESPACE, OPS, VisionOp, define_op
from inductor_vision.ops.transforms import as_one_batch
from torch import Tensor


@pytest.fixture
def define(monkeypatch) -> Iterator[Callable[..., VisionOp]]:
    """``define_op`` for operators that are gone after the test."""
    before = set(OPS)
    with torch.library._scoped_library(NAMESPACE, "FRAGMENT") as library:
        monkeypatch.setattr(registry, "_library", library)
        yield define_op
        for name in OPS.keys() - before:
            del OPS[name]
            GRADIENTS.pop(name, None)


def scaled(define: Callable[..., VisionOp], asked: list[Any] | None = None) -> VisionOp:
    """input * weight * factor + bias, by channel, with where it is positive as a second result."""

    def compute(input: Tensor, mode: str, weight: Tensor, factor: float, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        out = input * weight[:, None, None] * factor
        out = out if bias is None else out + bias[:, None, None]
        return out, (out > 0).int()

    def gradients(grad: Tensor, factor: float, weight: Tensor, input: Tensor, bias: Any, *, wanted: Sequence[bool]):
        if asked is not None:
            asked.append(wanted)
        return (
            grad * weight[:, None, None] * factor if wanted[0] else None,
            (grad * input).sum((0, 2, 3)) * factor if wanted[1] else None,
            grad.sum((0, 2, 3))[None].double() if wanted[2] else None,  # of any dtype, and in any shape
        )

    return define(
        "scaled(Tensor input, str mode, Tensor weight, float factor, Tensor? bias) -> (Tensor out, Tensor positive)",
        decomposition=compute,
        fake=lambda input, *_: (torch.empty_like(input), torch.empty_like(input, dtype=torch.int32)),
        gradient=Gradient(gradients, of="input, weight, bias", takes="factor, weight, input, bias"),
        autocast=False,
        fold=as_one_batch("input"),
    )


def test_the_schema_follows(define):
    schema = scaled(define).backward.overload._schema
    assert str(schema) == (
        f"{NAMESPACE}::scaled_backward(Tensor grad, float factor, Tensor weight, Tensor input, Tensor? bias, "
        "bool[3] wanted) -> (Tensor, Tensor, Tensor)"
    )
    assert OPS["scaled_backward"].family == "scaled"  # where its template is looked for


@pytest.mark.parametrize("with_bias", [True, False])
def test_gradients_are_those_of_the_program(define, with_bias):
    op = scaled(define)
    input, weight, bias = (torch.randn(n, dtype=torch.float64, requires_grad=True) for n in ((2, 3, 4, 5), (3,), (3,)))
    call = (input, "any", weight, 1.5, bias if with_bias else None)
    assert torch.autograd.gradcheck(lambda *args: op(*args)[0], call)
    out, positive = op(*call)
    assert out.requires_grad
    assert not positive.requires_grad
    test_utils = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(op.overload, call, test_utils=test_utils)
    with torch.no_grad():
        for wanted in ([True, True, True], [False, True, True], [True, False, False], [False, False, False]):
            gradient = torch.randn_like(out)
            torch.library.opcheck(op.backward.overload, (gradient, 1.5, weight, input, call[-1], wanted))
    with pytest.raises(RuntimeError, match="scaled: double backward is not supported"):
        (first,) = torch.autograd.grad(out.sum(), input, create_graph=True)
        first.sum().backward()


def test_only_what_is_wanted_is_asked_for(define):
    asked: list[Any] = []
    op = scaled(define, asked)
    input, weight, bias = torch.randn(2, 3, 4, 5), torch.randn(3, requires_grad=True), torch.randn(3)
    op(input, "any", weight, 1.5, bias)[0].sum().backward()
    results = op.backward(torch.randn(2, 3, 4, 5), 1.5, weight.detach(), input, None, [True, False, True])
    assert asked == [[False, True, False], [True, False, False]]  # of a bias that is None there is no gradient
    assert [tuple(result.shape) for result in results] == [(2, 3, 4, 5), (0,), (0,)]


def test_gradients_lie_as_what_they_are_of(define):
    op = scaled(define)
    input = torch.randn(2, 3, 4, 5).bfloat16().to(memory_format=torch.channels_last).requires_grad_()
    weight, bias = (torch.randn(3).bfloat16().requires_grad_() for _ in range(2))
    out, _ = op(input, "any", weight, 1.5, bias)
    tensors = input, weight, bias
    for gradient, tensor in zip(torch.autograd.grad(out.float().square().sum(), tensors), tensors, strict=True):
        assert gradient.dtype == tensor.dtype
        assert gradient.stride() == tensor.stride()


def test_images_of_all_calls_are_one_batch_unless_they_add_up(define):
    asked: list[Any] = []
    op = scaled(define, asked)
    inputs, weight = torch.randn(7, 2, 3, 4, 5), torch.randn(3)

    def loss(input: Tensor, weight: Tensor) -> Tensor:
        return op(input, "any", weight, 1.5, None)[0].square().sum()

    for argument, calls in ((0, 1), (1, 7)):  # the gradient of a weight is a sum over images
        asked.clear()
        result = torch.vmap(torch.func.grad(loss, argument), (0, None))(inputs, weight)
        assert len(asked) == calls
        expected = torch.stack([torch.func.grad(loss, argument)(input, weight) for input in inputs])
        torch.testing.assert_close(result, expected)


def test_a_list_has_a_call_for_each_of_its_tensors_that_needs_one(define):
    """The shapes of the list are kept, not the list; and a further tensor has no gradient."""
    made: list[int] = []

    def gradient(grad: Tensor, scales: Sequence[float], size: Sequence[int], item: int) -> Tensor:
        made.append(item)
        return (grad * scales[item]).expand(size)

    op = define(
        "weighted(Tensor[] inputs, Tensor shift, float[] scales) -> Tensor",
        decomposition=lambda inputs, shift, scales: sum(i.sum() * s for i, s in zip(inputs, scales)) + shift,
        fake=lambda inputs, shift, scales: shift.new_empty(()),
        gradient=Gradient(gradient, of="inputs", takes="scales, inputs.shape"),
        autocast=False,
    )
    assert str(op.backward.overload._schema) == (
        f"{NAMESPACE}::weighted_backward(Tensor grad, float[] scales, SymInt[] size, int item) -> Tensor"
    )
    inputs = [torch.randn(n, 2, requires_grad=n != 4) for n in (3, 4, 5)]
    shift = torch.randn((), requires_grad=True)
    op(inputs, shift, [2.0, 3.0, 4.0]).backward()
    assert made == [0, 2]
    assert [None if i.grad is None else i.grad.unique().item() for i in (*inputs, shift)] == [2, None, 4, None]


def no(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("not to be called")


WRONG = {
    "unknown argument": ("f(Tensor x) -> Tensor", {"of": "y"}, "f: nothing is called 'y'; there are x"),
    "unknown value": ("f(Tensor x) -> Tensor", {"of": "x", "takes": "x, y"}, "f: nothing is called 'y'; there are x"),
    "twice": ("f(Tensor x) -> Tensor", {"of": "x", "takes": "x, x"}, "f: the gradient is to take 'x' twice"),
    "a result": ("f(Tensor x) -> (Tensor out, Tensor where)", {"of": "out"}, "f: nothing is called 'out'; there are x"),
    "no property": ("f(Tensor x) -> Tensor", {"of": "x", "takes": "x.dtype"}, "f: nothing is called 'x.dtype'"),
    "a number": ("f(Tensor x, int n) -> Tensor", {"of": "n"}, "f: 'n' is no tensor but int: it has no gradient"),
    "taken": ("f(Tensor x, Tensor y, int wanted) -> Tensor", {"of": "x, y"}, "an argument 'wanted' of its own"),
    "no shape": ("f(Tensor x, int n) -> Tensor", {"of": "x", "takes": "n"}, "f: the gradient must take x or"),
    "one of two": (
        "f(Tensor x, Tensor y) -> Tensor", {"of": "x, y", "takes": "x, y.shape"}, "f: the gradient must take x, y or"
    ),
    "a list": ("f(Tensor[] x) -> Tensor", {"of": "x"}, "f: the gradient must take x or, if it is one, its shape"),
    "default": ("f(Tensor x, int n=1) -> Tensor", {"of": "x"}, "not the schema of an operator without default values"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_declarations(define, wrong):
    schema, declaration, message = WRONG[wrong]
    with pytest.raises(ValueError, match=re.escape(message)):
        define(schema, decomposition=no, fake=no, gradient=Gradient(no, **declaration))
    assert "f" not in OPS  # nothing of it is there


def test_schemas_are_parsed():
    parsed = parse_schema("f(Tensor[] x, SymInt[2] size, bool b) -> (Tensor out, Tensor)")
    assert parsed == ("f", {"x": "Tensor[]", "size": "SymInt[2]", "b": "bool"}, ["out", ""])
