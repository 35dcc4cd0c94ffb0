"""The benchmarks of patch_conv2d and its gradients: do contenders compute what they are said to?"""

import pytest
import torch
from inductor_vision.perf.spec import Case, Job, Unavailable
from inductor_vision.perf.suites import patch_conv2d as forward, patch_conv2d_backward as backward
from inductor_vision.perf.suites.patch_conv2d import Shape
from inductor_vision.perf.verify import relative_error

SHAPES = {
    "plain": Shape(7, 4, 5, 6),
    "everything": Shape(3, 9, 6, 8, kernel=5, stride=2, dilation=2, groups=2),
}


def job(inputs) -> Job:
    return Job(Case("test", "", lambda: inputs, 1e-5), inputs, 1)


def contenders(suite):
    return [contender for contender in suite.contenders if not contender.compiled and contender.role == "peer"]


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


@pytest.mark.parametrize("contender", contenders(backward.SUITE), ids=lambda contender: contender.name)
def test_gradients_of_peers_agree_with_the_reference(contender):
    problem = backward._build(SHAPES["everything"])
    prepared = contender.prepare(job(problem))
    assert relative_error(prepared.output, backward.SUITE.reference(problem)) < 1e-5


def test_the_limit_multiplies_what_is_outside_the_padding():
    """For 4 x 4 patches and a 3 x 3 kernel these are 100 of 144 products of a channel."""
    inputs = forward.build(Shape(7, 4, 18, 16))
    (limit,) = (contender for contender in forward.SUITE.contenders if contender.role == "limit")
    output = limit.prepare(job(inputs)).output
    assert output.numel() == forward.SUITE.reference(inputs).numel()
    assert forward.matrix_depth(inputs) == round(18 * 100 / 16)


def test_inputs_are_the_same_at_every_call():
    shape = Shape(4, 5, 6, dtype=torch.bfloat16)
    first, second = forward.build(shape), forward.build(shape)
    assert first.input.dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(first, second) if isinstance(a, torch.Tensor))


def test_descriptions():
    assert str(Shape(20480, 4)) == "20480 patches of 4x4, 32 to 64 ch"
    assert str(Shape(8, 4, 6, 4, groups=2, kernel=5, stride=2, dilation=3, dtype=torch.bfloat16)) == (
        "8 patches of 4x4, 6 to 4 ch, 5x5 kernel, stride 2, dilation 3, groups 2, bfloat16"
    )


@pytest.mark.slow
def test_compiled_gradients_can_be_asked_for_again():
    """All of the suite's times are of gradients that were asked for before."""
    (contender,) = (contender for contender in backward.SUITE.contenders if contender.name == "ours-channels-last")
    problem = backward._build(Shape(7, 4, 5, 6))
    prepared = contender.prepare(job(problem))
    for _ in range(2):
        assert relative_error(list(prepared.call()), backward.SUITE.reference(problem)) < 1e-5
