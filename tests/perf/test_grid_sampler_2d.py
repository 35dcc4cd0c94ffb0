"""The benchmark of grid_sampler_2d: do its contenders compute what they are said to compute?"""

import pytest
import torch
from inductor_vision.perf import backends
from inductor_vision.perf.spec import Case, Job
from inductor_vision.perf.suites.grid_sampler_2d import SUITE, Sampling
from inductor_vision.perf.verify import relative_error

PROBLEMS = (
    Sampling(3, (9, 14), batch=2, to=(7, 5), modes=(2, 1, True), smooth=False),
    Sampling(20, (9, 14), channels_last=True, backward=True),
)


@pytest.mark.parametrize("contender", [c for c in SUITE.contenders if c.role != "limit"], ids=lambda c: c.name)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_contenders_agree_with_the_reference(contender, problem, monkeypatch):
    monkeypatch.setattr(backends, "compiled", lambda module, tensors, **options: backends.eager(module, tensors))
    prepared = contender.prepare(Job(Case("test", "", lambda: problem, 0.0), problem, 1))
    assert relative_error_of_all(prepared.output, SUITE.reference(problem)) <= 1e-5


def relative_error_of_all(results, expected):
    results, expected = ((value,) if isinstance(value, torch.Tensor) else value for value in (results, expected))
    return max(relative_error(*pair) for pair in zip(results, expected, strict=True))


def test_every_case_is_described_by_what_sets_it_apart():
    assert len({case.description for case in SUITE.cases}) == len(SUITE.cases)
