"""The benchmarks of soft_nms and of rotated boxes: do their contenders compute what they are said to compute?"""

import dataclasses

import pytest
from inductor_vision.perf import backends
from inductor_vision.perf.boxes import reference
from inductor_vision.perf.spec import Case, Job, Unavailable
from inductor_vision.perf.suites import box_iou_rotated, nms_rotated, soft_nms
from inductor_vision.perf.verify import relative_error, tensors

PROBLEMS = {
    soft_nms.SUITE: (
        soft_nms.SoftSuppression(60, 0.3),
        soft_nms.SoftSuppression(60, 0.3, classes=3, method="gaussian"),
    ),
    nms_rotated.SUITE: (nms_rotated.RotatedSuppression(60, 0.3, rotated=True),),
    box_iou_rotated.SUITE: (box_iou_rotated.Overlaps(30),),
}
JOBS = [
    (contender, problem, suite.name)
    for suite, problems in PROBLEMS.items()
    for contender in suite.contenders
    for problem in problems
    if contender.role != "limit"
]


@pytest.mark.parametrize(
    ("contender", "problem", "suite"),
    JOBS,
    ids=[f"{suite}-{contender.name}-{problem}" for contender, problem, suite in JOBS],
)
def test_contenders_agree_with_the_reference(contender, problem, suite, monkeypatch):
    monkeypatch.setattr(backends, "compiled", lambda module, tensors, *, dynamic: backends.eager(module, tensors))
    monkeypatch.setattr(backends, "packaged", backends.eager)
    try:
        contender.check()
    except Unavailable as reason:
        pytest.skip(str(reason))
    prepared = contender.prepare(Job(Case("test", "", lambda: problem, 0.0), problem, 1))
    right = reference(problem)
    assert relative_error(prepared.output, right) <= 1e-5
    assert all(len(tensor) > 0 for tensor in tensors(right))


def test_cases_name_contenders_that_there_are():
    for suite in PROBLEMS:
        names = {contender.name for contender in suite.contenders}
        assert all(names.issuperset(case.contenders) for case in suite.cases)


def test_problems_are_the_same_at_every_call():
    problem = soft_nms.SoftSuppression(50, 0.3, classes=3)
    again = dataclasses.replace(problem)
    assert relative_error(problem.tensors, again.tensors) == 0
