"""The benchmark of deform_conv2d: do its contenders compute what they are said to compute?"""

import pytest
import torch
from inductor_vision.perf.spec import Case, Job, Unavailable
from inductor_vision.perf.suites import deform_conv2d as suite
from inductor_vision.perf.suites.deform_conv2d import SUITE, Shape
from inductor_vision.perf.verify import relative_error

SHAPES = {
    "plain": Shape(8, (5, 7), batch=2),
    "groups": Shape(16, 9, groups=2, offset_groups=4, stride=2, kernel=5),
    "depthwise": Shape(16, 6, groups=16, dilation=2),
    "out-channels": Shape(3, 8, out_channels=5, kernel=1),
}
EAGER = [contender for contender in SUITE.contenders if not contender.compiled and contender.role == "peer"]


@pytest.mark.parametrize("contender", EAGER, ids=lambda contender: contender.name)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_peers_agree_with_the_reference(contender, shape):
    inputs = suite.build(shape)
    try:
        contender.check()
        prepared = contender.prepare(Job(Case("test", "", lambda: inputs, 1e-5), inputs, 1))
    except Unavailable as reason:
        pytest.skip(str(reason))
    assert relative_error(prepared.output, suite._reference(inputs)) < 1e-5


def test_the_limit_has_the_shape_of_the_output():
    inputs = suite.build(SHAPES["groups"])
    limit = next(contender for contender in SUITE.contenders if contender.role == "limit")
    output = limit.prepare(Job(SUITE.cases[0], inputs, 1)).output
    assert output.shape == suite._reference(inputs).shape


def test_inputs_are_the_same_at_every_call():
    shape = Shape(4, 5, dtype=torch.bfloat16)
    first, second = suite.build(shape), suite.build(shape)
    assert first.input.dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(first, second) if isinstance(a, torch.Tensor))


def test_descriptions():
    assert str(Shape(64, 32)) == "64 ch, 32x32, batch 1"
    assert str(Shape(3, (5, 7), 2, out_channels=8, kernel=5, dtype=torch.bfloat16)) == (
        "3 to 8 ch, 5x7, batch 2, 5x5 kernel, bfloat16"
    )
    assert str(Shape(8, 4, groups=8)) == "8 ch, 4x4, batch 1, depthwise"
