"""Every kind of transformers' models that has multi-scale deformable attention, compiled as one graph and as a package.

It takes half an hour, so that it runs only where it is named: ``pytest tests/stock_transformers.py``, or ``-k d_fine``.
"""

from __future__ import annotations

import pytest
import torch
from inductor_vision import accelerate_transformers, export_detector
from inductor_vision.integrations.one_image import one_image
from inductor_vision.perf.suites.detectors import detections_error
from inductor_vision.tests.support.compiled import compile_and_run, run_alone
from inductor_vision.tests.support.cpp_program import detections_of, run_on
from inductor_vision.tests.support.transformers_models import MODELS, assert_same_results, inputs_of, small_model

pytestmark = pytest.mark.usefixtures("transformers")


# Windows of a Swin make sizes such formulas that Inductor takes very long to compile for any size.
SWIN = ("grounding_dino", "mask2former", "oneformer")


@pytest.mark.parametrize("freezing", [True, False])
@pytest.mark.parametrize("kind", MODELS)
def test_is_one_graph_for_images_of_two_sizes(kind, freezing):
    accelerate_transformers()
    model, inputs, others = small_model(kind), inputs_of(kind), inputs_of(kind, (96, 128))
    with torch.no_grad(), torch._dynamo.config.patch(automatic_dynamic_shapes=kind not in SWIN):
        compiled = compile_and_run(model, config={"freezing": freezing}, run=lambda model: model(**inputs))
        assert set(compiled.kinds) == {"template"}
        assert_same_results(compiled.result, model(**inputs))
        assert_same_results(compiled.function(**others), model(**others))


@pytest.mark.parametrize("kind", MODELS)
def test_package(kind, tmp_path, cpp_program):
    """For images of any size, where that compiles, in a Python without transformers and in C++."""
    model, inputs = small_model(kind), inputs_of(kind)
    del inputs["pixel_values"]
    any_size = kind not in (*SWIN, "rf_detr")
    example = torch.rand(3, 128, 160)
    path = export_detector(model, example, tmp_path / "model.pt2", any_size=any_size, threshold=-2.0, inputs=inputs)
    images = [torch.rand(3, *size) for size in ((128, 160), (192, 352))[: 1 + any_size]]
    detector = one_image(model, -2.0, inputs)  # every query is a detection
    with torch.no_grad():
        for image, ours in zip(images, run_alone(path, [(image,) for image in images], tmp_path)):
            assert detections_error(ours, detector(image)) < 1e-3
        image, right = images[-1], detector(images[-1])
    outputs, _ = run_on(cpp_program, path, image, tmp_path, threads=2)
    assert detections_error(detections_of(outputs, list(right), image.shape[1:]), right) < 1e-3
