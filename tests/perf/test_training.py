"""The benchmark of training steps: do its contenders compute what they are said to compute?"""

import pytest
from inductor_vision.perf.spec import Case, Job, Unavailable
from inductor_vision.perf.suites import deform_conv2d, training
from inductor_vision.perf.suites.deform_conv2d import Shape
from inductor_vision.perf.suites.training import SUITE
from inductor_vision.perf.verify import relative_error

CONTENDERS = {contender.name: contender for contender in SUITE.contenders}
CHECKED = [
    pytest.param(c, marks=pytest.mark.slow if c.compiled else (), id=c.name)
    for c in SUITE.contenders
    if c.role != "limit"
]


def prepare(contender, inputs):
    try:
        contender.check()
        return contender.prepare(Job(Case("test", "", lambda: inputs, 1e-5), inputs, 1))
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("contender", CHECKED)
def test_layers_agree_with_the_reference(contender):
    inputs = deform_conv2d.build(Shape(8, (5, 7), batch=2))
    assert relative_error(prepare(contender, inputs).output, training._reference(inputs)) < 1e-5


def test_the_limit_has_gradients_of_the_same_shapes():
    inputs = deform_conv2d.build(Shape(8, (5, 7), batch=2))
    output = prepare(CONTENDERS["conv2d"], inputs).output
    assert [tensor.shape for tensor in output] == [tensor.shape for tensor in training._reference(inputs)]


@pytest.mark.slow
def test_networks_agree_with_the_reference():
    """A step of the optimizer follows; the gradients that are compared are those of the first."""
    inputs = training._digits()
    prepared = prepare(CONTENDERS["torchvision"], inputs)
    assert relative_error(prepared.output, training._reference(inputs)) < 1e-4
    assert relative_error(prepared.call(), prepared.output) > 1e-4
