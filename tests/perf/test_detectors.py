"""The benchmark of whole detectors, on small ones: do contenders detect the same, and where does their time go?"""

import contextlib
import functools
import io
import time

import pytest
import torch
from inductor_vision.perf import backends, interleaving, machine, one_image
from inductor_vision.perf.isolated import prepare_in_own_process
from inductor_vision.perf.progress import Progress
from inductor_vision.perf.report import markdown, text_table
from inductor_vision.perf.results import CaseResult, Report, Row, Spread
from inductor_vision.perf.runner import Settings, run_case
from inductor_vision.perf.spec import Case, Contender, Job, Prepared, Suite, Unavailable
from inductor_vision.perf.suites import detectors
from inductor_vision.perf.suites.detectors import SUITE, Problem, detections_error, missed_share, winograd_error
from inductor_vision.tests.support.detectors import R_CNNS, small_detector

PROBLEMS = {
    kind: Problem(functools.partial(small_detector, kind), (90, 120), (4, 8))
    for kind in (*R_CNNS, "RetinaNet", "FCOS", "SSD")
}
CONTENDERS = {contender.name: contender for contender in SUITE.contenders}

pytestmark = pytest.mark.usefixtures("torchvision")


def job_of(kind):
    case = detectors.case(kind, PROBLEMS[kind])
    return Job(case, case.build(), 1)


def assert_right(name, kind, right):
    job, contender = job_of(kind), CONTENDERS[name]
    tolerance = job.case.tolerance if contender.tolerance is None else contender.tolerance
    assert (contender.error or SUITE.error)(contender.prepare(job).output, right) < tolerance, name


@pytest.mark.parametrize("kind", PROBLEMS)
def test_there_are_detections(kind):
    right = SUITE.reference(job_of(kind).inputs)
    assert 4 <= len(right["scores"]) <= 8
    assert_right("stock-channels-last", kind, right)


def test_contenders_agree_with_the_reference(monkeypatch):
    monkeypatch.setattr(backends, "compiled", lambda module, tensors, **options: backends.eager(module, tensors))
    right = SUITE.reference(job_of("FasterRCNN").inputs)
    for name, contender in CONTENDERS.items():
        eager = not name.startswith(("ours-aoti", "onnxruntime", "openvino")) and "converted" not in name
        if eager and contender.role != "limit":
            assert_right(name, "FasterRCNN", right)


@pytest.mark.slow
def test_other_runtimes_agree_with_the_reference(monkeypatch, tmp_path):
    pytest.importorskip("onnxscript")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    right = SUITE.reference(job_of("SSD").inputs)
    tried = []
    for name in ("onnxruntime", "openvino", "openvino-default"):
        with contextlib.suppress(Unavailable):
            CONTENDERS[name].check()
            tried.append(name)
            assert_right(name, "SSD", right)
    if not tried:
        pytest.skip("neither onnxruntime nor openvino is installed")


def test_the_limit_multiplies_as_often_as_the_detector():
    job = job_of("FasterRCNN")
    layers = [
        module for module in job.inputs.detector.modules() if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear))
    ]
    on_each_level = 3  # of the proposals' head, for two levels
    assert len(CONTENDERS["multiplications"].prepare(job).call()) == len(layers) + on_each_level


def some_detections():
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(6, 2, generator=generator) * 100
    return {
        "boxes": torch.cat([corners, corners + 20], dim=1),
        "labels": torch.tensor([1, 1, 2, 2, 3, 3]),
        "scores": torch.tensor([0.9, 0.8, 0.8, 0.7, 0.6, 0.5]),
        "keypoints": torch.rand(6, 50, 3, generator=generator) * 100,
    }


def changed(**values):
    return {**some_detections(), **values}


def test_detections_of_the_same_score_come_in_any_order():
    right = some_detections()
    swapped = {name: value[[0, 2, 1, 3, 4, 5]] for name, value in right.items()}
    assert detections_error(swapped, right) == 0
    reversed_order = {name: value.flip(0) for name, value in right.items()}
    assert detections_error(reversed_order, right) > 0.1


def test_wrong_detections_are_wrong():
    right = some_detections()
    assert detections_error(right, right) == 0
    assert detections_error({name: value[:5] for name, value in right.items()}, right) == float("inf")
    assert detections_error(changed(labels=torch.tensor([1, 1, 2, 2, 3, 1])), right) == float("inf")
    assert detections_error(changed(boxes=right["boxes"] + 1), right) == pytest.approx(0.01, rel=0.5)
    assert detections_error(right["boxes"], right) == float("inf")
    twice = right["boxes"][[0, 0, 2, 3, 4, 5]]
    assert detections_error(changed(boxes=twice), right) > 0.1


def test_how_exact_detections_are_with_winograd():
    right = some_detections()
    assert winograd_error(right, right) == 0
    assert winograd_error(changed(boxes=right["boxes"] + 0.05), right) == pytest.approx(5e-4, rel=0.01)
    assert winograd_error(changed(scores=right["scores"] - 5e-4), right) >= 5e-4
    assert winograd_error(changed(labels=torch.tensor([1, 1, 2, 2, 3, 1])), right) == float("inf")


def test_the_share_of_detections_without_counterpart():
    right = some_detections()
    assert missed_share(right, right) == 0
    assert missed_share({name: value[:5].bfloat16() for name, value in right.items()}, right) == pytest.approx(1 / 11)
    assert missed_share(changed(labels=torch.tensor([1, 1, 2, 2, 3, 1])), right) == pytest.approx(2 / 12)
    assert missed_share(changed(boxes=right["boxes"] + 1), right) == 0
    assert missed_share(changed(boxes=right["boxes"] + 1000), right) == 1
    assert missed_share(changed(boxes=right["boxes"] * float("nan")), right) == float("inf")
    assert missed_share(right["boxes"], right) == float("inf")


def test_a_few_keypoints_may_be_elsewhere():
    right = some_detections()
    moved = right["keypoints"].clone()
    moved[3, 7] += 30
    assert detections_error(changed(keypoints=moved), right) == 0
    moved[3:5] += 30
    assert detections_error(changed(keypoints=moved), right) > 0.1
    moved[0, 0, 0] = float("nan")
    assert detections_error(changed(keypoints=moved), right) == float("inf")


def test_shares_of_stock_functions_in_eager_mode(torchvision):
    from torchvision.ops import boxes

    stock = boxes.batched_nms
    shares = CONTENDERS["stock"].prepare(job_of("MaskRCNN")).shares()
    assert set(shares) == {"roi_align", "nms", "decode", "paste_masks"}
    assert all(share > 0 for share in shares.values()) and sum(shares.values()) < 1
    assert boxes.batched_nms is stock


def test_shares_of_compiled_kernels():
    from inductor_vision import nms

    boxes, scores = torch.rand(200, 2).repeat(1, 2) + torch.tensor([0, 0, 1, 1]), torch.rand(200)
    with one_image.kernels_named():
        prepared = backends.compiled(backends.Function(lambda *tensors: nms(*tensors, 0.5)), (boxes, scores))
    shares = one_image.shares(prepared.call, one_image.TEMPLATE_KERNEL)
    assert set(shares) == {"nms"} and 0 < shares["nms"] < 1


def in_another_process(job):
    """Returns which process and how many threads."""
    import os

    def call():
        job.inputs.append(0)
        return torch.tensor([os.getppid(), torch.get_num_threads(), len(job.inputs)])

    return Prepared(call, call(), shares=lambda: {"all": 0.5})


def spins_on(job):
    """As the threads of some libraries do for a while after each call."""
    import threading

    def spin():
        end = time.perf_counter() + 0.15
        while time.perf_counter() < end:
            pass

    def call():
        threading.Thread(target=spin).start()

    return Prepared(call, torch.zeros(1))


def test_the_threads_of_another_process_are_waited_for():
    prepared = prepare_in_own_process(spins_on, Job(Case("case", "", list, 0.0), [], 1))
    start = time.perf_counter()
    prepared.call()
    assert time.perf_counter() - start < 0.1
    prepared.settle()
    assert time.perf_counter() - start >= 0.15


def ends(job):
    import os

    os._exit(3)


def refuses(job):
    raise Unavailable("not this one")


def test_isolated_contenders(monkeypatch):
    import os

    monkeypatch.setattr(interleaving, "wait_until_idle", lambda: None)
    before = machine.foreign_seconds()
    contenders = tuple(
        Contender(prepare.__name__, "ours", prepare, isolated=True) for prepare in (in_another_process, ends, refuses)
    )
    case = Case("case", "", list, 0.0)
    suite = Suite("fake", "", (case,), contenders, lambda inputs: torch.tensor([os.getpid(), 3, 1]))
    result = run_case(suite, case, contenders, Settings(3, 0.05), Progress(io.StringIO()))
    alone, ended, refused = result.rows
    assert (alone.status, alone.shares) == ("ok", {"all": 0.5}) and alone.rounds >= 5 and alone.memory < 4 << 20
    assert (ended.status, ended.reason) == ("failed", "RuntimeError: its process ended with exit code 3")
    assert (refused.status, refused.reason) == ("unavailable", "not this one")
    assert before is None or machine.foreign_seconds() >= before - 0.5


def test_a_report_of_shares():
    spread = Spread(1.0, 1.0, 1.0)
    rows = (
        Row("us", "ours", "ok", error=1e-7, seconds=spread, rounds=5, memory=3 << 20, shares={"nms": 0.01}),
        Row("them", "peer", "ok", error=1e-7, seconds=spread, rounds=5, shares={"nms": 0.02, "roi_align": 0.2}),
    )
    described = {"cpu": "", "vector_instructions": "", "cores": 2, "compiler": "", "date": "", "versions": {}}
    report = Report(described, {"threads": 2}, (CaseResult("detectors", "small", "", 1e-4, rows),))
    assert "  them: 22.0% (nms 2.0%, roi_align 20.0%) of the time in operators" in text_table(report).splitlines()
    assert "| small | 1.0% (nms 1.0%); 3.0 MB | 22.0% (nms 2.0%, roi_align 20.0%); - |" in markdown(report)
