"""The benchmark of multiscale_deformable_attention: do its contenders compute what they are said to compute?"""

import dataclasses

import pytest
import torch
from inductor_vision.perf import backends
from inductor_vision.perf.spec import Case, Job, Unavailable
from inductor_vision.perf.suites.multiscale_deformable_attention import SUITE, Attention, _centres
from inductor_vision.perf.verify import relative_error

ENCODER = Attention(((5, 7), (3, 4)), (2, 2), heads=2, channels=5, batch=2)
PROBLEMS = (
    ENCODER,
    dataclasses.replace(ENCODER, points=(3, 1), queries=9),
    dataclasses.replace(ENCODER, queries=9, dtype=torch.bfloat16),
    dataclasses.replace(ENCODER, backward=True),
)


@pytest.mark.parametrize("contender", [c for c in SUITE.contenders if c.role != "limit"], ids=lambda c: c.name)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_contenders_agree_with_the_reference(contender, problem, transformers, monkeypatch):
    if problem.backward and not contender.name.endswith(("compiled", "transformers")):
        pytest.skip("forward only")
    for name in ("compiled", "packaged"):
        monkeypatch.setattr(backends, name, lambda module, tensors, **options: backends.eager(module, tensors))
    gradients = backends.gradients
    monkeypatch.setattr(
        backends, "gradients", lambda function, leaves, grad, compile: gradients(function, leaves, grad, compile=False)
    )
    try:
        contender.check()
        output = contender.prepare(Job(Case("test", "", lambda: problem, 0.0), problem, 1)).output
    except Unavailable as reason:
        pytest.skip(str(reason))
    assert relative_error(output, SUITE.reference(problem)) <= (1e-2 if problem.dtype == torch.bfloat16 else 1e-4)


def test_the_limit_reads_four_corners_of_each_point():
    problem = SUITE.cases[0].build()
    (limit,) = (contender for contender in SUITE.contenders if contender.role == "limit")
    read = limit.prepare(Job(SUITE.cases[0], problem, 1)).output.numel() * (64 << 10)
    assert read == pytest.approx(17821 * 8 * 16 * 4 * 32 * 4, rel=1e-3)


def test_queries_of_an_encoder_are_at_the_centres_of_pixels():
    expected = [[0.25, 0.5], [0.75, 0.5], [0.5, 1 / 6], [0.5, 0.5], [0.5, 5 / 6]]
    torch.testing.assert_close(_centres(((1, 2), (3, 1))), torch.tensor(expected))
