"""The benchmarks of depthwise_separable_conv2d and its gradients: do contenders compute what they are said to?"""

import pytest
import torch
from inductor_vision.perf.spec import Case, Job, Unavailable
from inductor_vision.perf.suites import (
    depthwise_separable_conv2d as forward,
    depthwise_separable_conv2d_backward as backward,
)
from inductor_vision.perf.suites.depthwise_separable_conv2d import Shape
from inductor_vision.perf.verify import relative_error

SHAPES = {
    "plain": Shape(8, 12, 7, batch=2),
    "everything": Shape(6, 5, 9, batch=3, kernel=5, stride=2, dilation=2, multiplier=2),
}


def job(inputs) -> Job:
    return Job(Case("test", "", lambda: inputs, 1e-5), inputs, 1)


def contenders(suite, role="peer"):
    return [contender for contender in suite.contenders if not contender.compiled and contender.role == role]


@pytest.mark.parametrize("contender", contenders(forward.SUITE), ids=lambda contender: contender.name)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_peers_agree_with_the_reference(contender, shape):
    inputs = forward.build(shape)
    try:
        contender.check()
        prepared = contender.prepare(job(inputs))
    except Unavailable as reason:
        pytest.skip(str(reason))
    assert relative_error(prepared.output, forward.SUITE.reference(inputs)) < 1e-5


@pytest.mark.slow
def test_the_limit_has_the_shape_of_the_output():
    inputs = forward.build(SHAPES["everything"])
    (limit,) = (contender for contender in forward.SUITE.contenders if contender.role == "limit")
    assert limit.prepare(job(inputs)).output.shape == forward.SUITE.reference(inputs).shape


def test_inputs_are_the_same_at_every_call():
    shape = Shape(4, 5, 6, dtype=torch.bfloat16)
    first, second = forward.build(shape), forward.build(shape)
    assert first.input.dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(first, second) if isinstance(a, torch.Tensor))
    assert torch.equal(backward._build(shape, True).grad, backward._build(shape, True).grad)


def test_descriptions():
    assert str(Shape(64, 128, 224)) == "64 to 128 ch, 224x224, batch 1"
    assert str(Shape(8, 4, 9, 2, 4, "silu", kernel=5, stride=2, dilation=3, dtype=torch.bfloat16)) == (
        "8 to 4 ch, 9x9, batch 2, 5x5 kernel, stride 2, dilation 3, multiplier 4, silu, bfloat16"
    )


@pytest.mark.parametrize("contender", backward.SUITE.contenders, ids=lambda contender: contender.name)
@pytest.mark.parametrize("step", [False, True], ids=["gradients", "step"])
def test_gradients_agree_with_the_reference(contender, step, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    problem = backward._build(Shape(6, 5, 9, batch=3, stride=2, activation="silu"), step)
    try:
        contender.check()
    except Unavailable as reason:
        pytest.skip(str(reason))
    prepared = contender.prepare(job(problem))
    assert relative_error(list(prepared.output), backward.SUITE.reference(problem)) < 1e-5
    assert relative_error(list(prepared.call()), backward.SUITE.reference(problem)) < 1e-5


@pytest.mark.slow
def test_compiled_gradients_can_be_asked_for_again():
    """All of the suite's times are of gradients that were asked for before."""
    (contender,) = (contender for contender in backward.SUITE.contenders if contender.name == "ours-channels-last")
    problem = backward._build(Shape(6, 5, 9, batch=3, stride=2, activation="silu"), False)
    prepared = contender.prepare(job(problem))
    for _ in range(2):
        assert relative_error(list(prepared.call()), backward.SUITE.reference(problem)) < 1e-5
