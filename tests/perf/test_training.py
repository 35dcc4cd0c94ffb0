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


@pytest.mark.parametrize("contender", [param for param in CHECKED if param.id in training._LAYER])
def test_layers_agree_with_the_reference(contender):
    inputs = deform_conv2d.build(Shape(8, (5, 7), batch=2))
    assert relative_error(prepare(contender, inputs).output, training._reference(inputs)) < 1e-5


def test_the_limit_computes_the_same_gradients():
    """Where nothing is moved and every mask is 1."""
    inputs = deform_conv2d.build(Shape(8, (5, 7), batch=2))
    inputs = inputs._replace(offset=inputs.offset * 0, mask=inputs.mask * 0 + 1)
    input, _, weight, bias, _ = training._reference(inputs)
    assert relative_error(prepare(CONTENDERS["conv2d"], inputs).output, [input, weight, bias]) < 1e-5


@pytest.mark.slow
def test_networks_agree_with_the_reference():
    """A step of the optimizer follows; the gradients that are compared are those of the first."""
    inputs = training._digits()
    prepared = prepare(CONTENDERS["torchvision"], inputs)
    assert relative_error(prepared.output, training._reference(inputs)) < 1e-4
    assert relative_error(prepared.call(), prepared.output) > 1e-4
