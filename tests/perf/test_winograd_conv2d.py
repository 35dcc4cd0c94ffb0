"""The benchmark of winograd_conv2d: do contenders compute what they are said to?"""

import pytest
import torch
from inductor_vision.perf.spec import Case, Job, Unavailable
from inductor_vision.perf.suites import winograd_conv2d as suite
from inductor_vision.perf.suites.winograd_conv2d import Shape
from inductor_vision.perf.verify import relative_error

SHAPES = {"plain": Shape(5, 6, 9, 14), "everything": Shape(6, 8, 10, 7, batch=2, groups=2, tile=2)}


def contenders(role):
    return [contender for contender in suite.SUITE.contenders if not contender.compiled and contender.role == role]


@pytest.mark.parametrize("contender", contenders("peer"), ids=lambda contender: contender.name)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_peers_agree_with_the_reference(contender, shape):
    inputs = suite.build(shape)
    try:
        contender.check()
        prepared = contender.prepare(Job(Case("test", "", lambda: inputs, 1e-5), inputs, 1))
    except Unavailable as reason:
        pytest.skip(str(reason))
    assert relative_error(prepared.output, suite.SUITE.reference(inputs)) < 1e-5


def test_the_limit_multiplies_all_tiles():
    """Of 9 x 14 outputs these are 3 x 4, at 36 points."""
    values, weights = suite.products(suite.build(Shape(5, 6, 9, 14)))
    assert values.shape == (36, 12, 5) and weights.shape == (36, 5, 6)


def test_inputs_are_the_same_at_every_call():
    shape = Shape(4, 5, 6, 7, dtype=torch.bfloat16)
    first, second = suite.build(shape), suite.build(shape)
    assert first.input.dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(first, second) if isinstance(a, torch.Tensor))


def test_descriptions():
    assert str(Shape(256, 128, 50, 68)) == "256 to 128 ch, 50x68"
    assert str(Shape(8, 4, 6, 4, groups=2, batch=3, tile=2, dtype=torch.bfloat16)) == (
        "8 to 4 ch, 6x4, batch 3, groups 2, F(2x2), bfloat16"
    )
