"""The benchmark of segmentation models, whose contenders are those of classifiers."""

import pytest
import torch
from inductor_vision.perf.spec import Job
from inductor_vision.perf.suites import classifiers
from inductor_vision.perf.suites.segmentation import SUITE, Problem

PROBLEM = Problem("lraspp_mobilenet_v3_large", 2, 64)

pytestmark = pytest.mark.usefixtures("torchvision_python")


def test_a_map_of_classes_that_depends_on_the_images():
    scores = SUITE.reference(PROBLEM)
    assert scores.shape == (2, 21, 64, 64) and scores.dtype == torch.float64
    assert (scores[0] - scores[1]).abs().max() > 1e-3 * scores.abs().max()


def test_contenders_are_those_of_classifiers():
    assert SUITE.contenders == classifiers.SUITE.contenders
    case = classifiers.case(PROBLEM)
    (eager,) = (contender for contender in SUITE.contenders if contender.name == "eager")
    torch.testing.assert_close(
        eager.prepare(Job(case, case.build(), 1)).output.double(), SUITE.reference(PROBLEM), rtol=1e-3, atol=1e-3
    )
