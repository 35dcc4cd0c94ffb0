"""The benchmark of classifiers, on small images: do contenders compute the same, with the fusion and without?"""

import pytest
import torch
from inductor_vision.lowering.installation import installer
from inductor_vision.lowering.passes.depthwise_separable import FuseDepthwiseSeparable
from inductor_vision.perf import backends
from inductor_vision.perf.spec import Job
from inductor_vision.perf.suites import classifiers
from inductor_vision.perf.suites.classifiers import SUITE, Problem
from inductor_vision.perf.verify import relative_error
from torch._inductor import config

PROBLEM = Problem("mobilenet_v3_small", 2, 64)

pytestmark = pytest.mark.usefixtures("torchvision_python")


@pytest.fixture
def switches(monkeypatch):
    """Whether the fusion was on when each model was compiled, which is not done here."""
    on = []

    def eager(module, tensors, **options):
        on.append(any(isinstance(other, FuseDepthwiseSeparable) for other in config.pre_grad_custom_pass or ()))
        return backends.eager(module, tensors)

    monkeypatch.setattr(backends, "compiled", eager)
    monkeypatch.setattr(backends, "packaged", eager)
    monkeypatch.setattr(installer, "_fuse_depthwise_separable", False)
    with config.patch(pre_grad_custom_pass=None):
        yield on


@pytest.mark.parametrize("contender", SUITE.contenders, ids=lambda contender: contender.name)
def test_contenders_agree_with_the_reference(contender, switches):
    case = classifiers.case(PROBLEM)
    output = contender.prepare(Job(case, case.build(), 1)).output
    assert relative_error(output, SUITE.reference(PROBLEM)) < case.tolerance
    assert switches == [contender.role == "ours"] * contender.compiled


def test_models_and_images_are_the_same_at_every_call():
    first, second = PROBLEM.model(), PROBLEM.model()
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))
    assert torch.equal(PROBLEM.images(), PROBLEM.images())


def test_results_depend_on_the_images():
    """Random weights would tell nothing apart if they gave the same logits for all."""
    logits = SUITE.reference(PROBLEM)
    assert relative_error(logits[0], logits[1]) > 1e-3
