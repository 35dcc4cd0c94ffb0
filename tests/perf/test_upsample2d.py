"""The benchmark of upsample2d: do its contenders compute what they are said to compute?"""

import pytest
import torch
from inductor_vision.perf import backends
from inductor_vision.perf.spec import Case, Job
from inductor_vision.perf.suites.upsample2d import SUITE, Resize
from inductor_vision.perf.verify import relative_error

PROBLEMS = (
    Resize(3, (9, 14), (17, 20), (3, 5)),
    Resize(20, (9, 14), (18, 28), dtype=torch.bfloat16, channels_last=True),
    Resize(5, (9, 14), (8, 31), mode="bicubic"),
)


@pytest.mark.parametrize("contender", [c for c in SUITE.contenders if c.role != "limit"], ids=lambda c: c.name)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_contenders_agree_with_the_reference(contender, problem, monkeypatch):
    for name in ("compiled", "packaged"):
        monkeypatch.setattr(backends, name, lambda module, tensors, **options: backends.eager(module, tensors))
    prepared = contender.prepare(Job(Case("test", "", lambda: problem, 0.0), problem, 1))
    right = SUITE.reference(problem)
    assert prepared.output.shape == right.shape
    assert relative_error(prepared.output, right) <= (1e-2 if problem.dtype == torch.bfloat16 else 1e-5)
