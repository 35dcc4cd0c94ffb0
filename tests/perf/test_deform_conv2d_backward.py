"""The benchmark of deform_conv2d's gradients: do its contenders compute what they are said to compute?"""

import pytest
import torch
from inductor_vision.perf.spec import Case, Job, Unavailable
from inductor_vision.perf.suites import deform_conv2d_backward as suite
from inductor_vision.perf.suites.deform_conv2d import Shape
from inductor_vision.perf.suites.deform_conv2d_backward import SUITE
from inductor_vision.perf.verify import relative_error

SHAPES = {
    "groups": Shape(16, 9, batch=2, groups=2, offset_groups=4, stride=2, kernel=5),
    "depthwise": Shape(16, (6, 5), groups=16, dilation=2),
}
CHECKED = [contender for contender in SUITE.contenders if contender.role != "limit"]


def job(shape: Shape) -> Job:
    inputs = suite._build(shape)
    return Job(Case("test", "", lambda: inputs, 1e-5), inputs, 1)


@pytest.mark.parametrize(
    "contender",
    [pytest.param(c, marks=pytest.mark.slow if c.compiled else (), id=c.name) for c in CHECKED],
)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_all_agree_with_the_reference(contender, shape):
    try:
        contender.check()
        prepared = contender.prepare(job(shape))
    except Unavailable as reason:
        pytest.skip(str(reason))
    assert relative_error(prepared.output, suite._reference(job(shape).inputs)) < 1e-5


def test_the_limit_computes_the_same_gradients():
    """Where nothing is moved and every mask is 1."""
    problem = suite._build(SHAPES["groups"])
    arguments = problem.arguments
    arguments = arguments._replace(offset=arguments.offset * 0, mask=arguments.mask * 0 + 1)
    problem = problem._replace(arguments=arguments)
    input, _, weight, bias, _ = suite._reference(problem)
    for limit in (contender for contender in SUITE.contenders if contender.role == "limit"):
        output = limit.prepare(Job(SUITE.cases[0], problem, 1)).output
        assert relative_error(output, [input, weight, bias]) < 1e-5


def test_inputs_are_the_same_at_every_call():
    first, second = (suite._build(Shape(4, 5, dtype=torch.bfloat16)) for _ in range(2))
    assert first.grad.dtype == torch.bfloat16
    assert torch.equal(first.grad, second.grad) and torch.equal(first.arguments.input, second.arguments.input)
