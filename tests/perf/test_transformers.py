"""The benchmark of transformers' models, on small ones: do contenders detect the same?"""

import functools

import pytest
import torch
from inductor_vision.integrations.models import accelerate
from inductor_vision.perf import backends, one_image
from inductor_vision.perf.graph_breaks import graph_breaks
from inductor_vision.perf.spec import Job
from inductor_vision.perf.suites import transformers as suite
from inductor_vision.perf.suites.transformers import SUITE, Problem
from inductor_vision.tests.support.transformers_models import MODELS, SIZE, inputs_of, small_model

CONTENDERS = {contender.name: contender for contender in SUITE.contenders}

pytestmark = pytest.mark.usefixtures("transformers")


def job_of(kind: str) -> Job:
    inputs = inputs_of(kind)
    del inputs["pixel_values"]
    case = suite.case(kind, Problem(functools.partial(small_model, kind), SIZE, inputs, (4, 8)))
    return Job(case, case.build(), 1)


@pytest.mark.parametrize("kind", MODELS)
def test_there_are_detections(kind):
    """The scores of each are spread by layers that the suite names."""
    job = job_of(kind)
    right = SUITE.reference(job.inputs)
    assert 1 <= len(right["scores"]) <= 8
    assert SUITE.error(CONTENDERS["stock"].prepare(job).output, right) == 0
    with torch.no_grad():
        every = job.inputs.detector.model(pixel_values=job.inputs.image[None], **job.inputs.inputs)
    logits = every["logits" if "logits" in every else "class_queries_logits"]
    assert logits[logits.isfinite()].std() > 0.1


def test_contenders_agree_with_the_reference(monkeypatch):
    monkeypatch.setattr(backends, "compiled", lambda module, tensors, **options: backends.eager(module, tensors))
    accelerate()
    job = job_of("rt_detr")
    right = SUITE.reference(job.inputs)
    for name in ("ours-frozen", "ours-compiled", "stock-compiled"):
        assert SUITE.error(CONTENDERS[name].prepare(job).output, right) < job.case.tolerance
    layers = [layer for layer in job.inputs.detector.modules() if isinstance(layer, one_image.MULTIPLYING)]
    assert len(CONTENDERS["multiplications"].prepare(job).call()) >= len(layers) // 2


def test_graph_breaks():
    assert graph_breaks(Breaking(), {"x": torch.ones(3)}) == 1
    with pytest.raises(torch._dynamo.exc.Unsupported):
        graph_breaks(Breaking(), {"x": torch.ones(3)}, fullgraph=True)


class Breaking(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + 1
        torch._dynamo.graph_break()
        return 2 * x
