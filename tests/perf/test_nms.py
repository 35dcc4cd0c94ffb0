"""The benchmark of nms: do its contenders compute what they are said to compute?"""

import pytest
import torch
from inductor_vision.perf import backends
from inductor_vision.perf.boxes import reference
from inductor_vision.perf.spec import Case, Job, Unavailable
from inductor_vision.perf.suites.nms import SUITE, Suppression
from inductor_vision.perf.verify import relative_error

PROBLEMS = (Suppression(300, 0.3), Suppression(300, 0.3, density=1000), Suppression(300, 0.3, classes=4))
COMPARED = [contender for contender in SUITE.contenders if contender.role != "limit"]


@pytest.mark.parametrize("contender", COMPARED, ids=lambda contender: contender.name)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_contenders_agree_with_thereference(contender, problem, monkeypatch):
    monkeypatch.setattr(backends, "compiled", lambda module, tensors, *, dynamic: backends.eager(module, tensors))
    monkeypatch.setattr(backends, "packaged", backends.eager)
    try:
        contender.check()
        prepared = contender.prepare(Job(Case("test", "", lambda: problem, 0.0), problem, 1))
    except Unavailable as reason:
        if problem.classes is None or "every box for every class" not in str(reason):
            pytest.skip(str(reason))
        return
    assert 0 < len(prepared.output) < problem.count
    assert relative_error(prepared.output, reference(problem)) == 0


def test_a_wrong_index_is_not_right():
    right = reference(PROBLEMS[0])
    wrong = right.clone()
    wrong[-1] += 1
    assert relative_error(wrong, right) > 0


def test_the_image_grows_with_the_boxes():
    few, many = (Suppression(count, 0.5, density=1000).tensors[0] for count in (1000, 4000))
    assert many[:, 2].max() / few[:, 2].max() == pytest.approx(2, rel=0.1)
    assert (many[:, 2] - many[:, 0]).max() <= 404 and (few[:, 2] - few[:, 0]).max() <= 404


def test_scores_are_distinct():
    _, scores = Suppression(1000, 0.5).tensors
    assert scores.unique().numel() == 1000 and scores.min() > 0


def test_problems_are_the_same_at_every_call():
    first, second = Suppression(100, 0.5, classes=3), Suppression(100, 0.5, classes=3)
    assert all(torch.equal(a, b) for a, b in zip(first.tensors, second.tensors, strict=True))
