"""Models of transformers that take one image detect what transformers' own image processors make of their results."""

from __future__ import annotations

import pytest
import torch
from inductor_vision.integrations.one_image import OneImage, OneImageOfTransformers, one_image
from inductor_vision.tests.support.detectors import small_detector
from inductor_vision.tests.support.transformers_models import inputs_of, small_model
from torch import nn

PROCESSORS = {
    "deformable_detr": "DeformableDetrImageProcessor",
    "rt_detr": "RTDetrImageProcessor",
    "rt_detr_v2": "RTDetrImageProcessor",
    "d_fine": "RTDetrImageProcessor",
    "rf_detr": "RfDetrImageProcessor",
}


def median_score(model: nn.Module, image: torch.Tensor, **inputs: torch.Tensor) -> float:
    """A threshold that half of the scores are above, in the middle between two of them."""
    scores = OneImageOfTransformers(model, -2.0, inputs)(image)["scores"]
    half = len(scores) // 2
    return scores[half - 1 : half + 1].mean().item()


@pytest.mark.parametrize("kind", PROCESSORS)
def test_boxes_are_those_of_the_image_processor(transformers, torchvision_python, kind):
    model, image = small_model(kind), inputs_of(kind)["pixel_values"][0]
    processor = getattr(transformers, PROCESSORS[kind])()
    more = {} if "RTDetr" in PROCESSORS[kind] else {"top_k": 12}  # as many as there are queries
    with torch.no_grad():
        threshold = median_score(model, image)
        ours = OneImageOfTransformers(model, threshold)(image)
        outputs, size = model(pixel_values=image[None]), image.shape[1:]
        (theirs,) = processor.post_process_object_detection(
            outputs, threshold=threshold, target_sizes=[tuple(size)], **more
        )
    assert list(ours) == ["scores", "labels", "boxes"] and len(ours["scores"]) == 6
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name])


def test_a_class_for_nothing(transformers):
    """DETR's logits, and YOLOS', have one more class, whose probability counts against the others."""
    from transformers.models.yolos.modeling_yolos import YolosObjectDetectionOutput

    class Model(nn.Module):
        config = transformers.YolosConfig(num_labels=3)

        def forward(self, pixel_values):
            return YolosObjectDetectionOutput(logits=logits, pred_boxes=torch.rand(1, 5, 4))

    logits = torch.randn(1, 5, 4)
    found = OneImageOfTransformers(Model().eval(), 0.0)(torch.rand(3, 20, 30))
    probabilities = logits[0].softmax(1)[:, :3]
    torch.testing.assert_close(found["scores"], probabilities.amax(1).sort(descending=True)[0])
    assert found["labels"].tolist() == probabilities[probabilities.amax(1).argsort(descending=True)].argmax(1).tolist()


def test_prompt(transformers):
    model, inputs = small_model("grounding_dino"), inputs_of("grounding_dino")
    image = inputs.pop("pixel_values")[0]
    with torch.no_grad():
        threshold = median_score(model, image, **inputs)
        ours = OneImageOfTransformers(model, threshold, inputs)(image)
        logits = model(pixel_values=image[None], **inputs).logits[0].sigmoid()
    best, token = logits.max(1)
    kept = (best > threshold).nonzero().flatten()
    kept = kept[best[kept].argsort(descending=True)]
    torch.testing.assert_close(ours["scores"], best[kept])
    assert torch.equal(ours["labels"], token[kept]) and len(kept) == 6


@pytest.mark.parametrize("kind", ["mask2former", "oneformer"])
def test_instances_are_those_of_the_image_processor(transformers, torchvision_python, kind):
    """In images of 384 x 384, the only size whose masks transformers does not resize in between."""
    model, inputs = small_model(kind), inputs_of(kind, (384, 384))
    image = inputs.pop("pixel_values")[0]
    with torch.no_grad():
        threshold = median_score(model, image, **inputs)
        ours = OneImageOfTransformers(model, threshold, inputs)(image)
        outputs = model(pixel_values=image[None], **inputs)
        processor = transformers.Mask2FormerImageProcessor()
        (theirs,) = processor.post_process_instance_segmentation(
            outputs, threshold=threshold, target_sizes=[(384, 384)], return_binary_maps=True
        )
    segments = theirs["segments_info"]
    order = torch.tensor([segment["score"] for segment in segments]).argsort(descending=True)
    assert len(segments) == len(ours["scores"]) > 1
    for place, at in enumerate(order.tolist()):
        assert ours["scores"][place].item() == pytest.approx(segments[at]["score"], abs=2e-6)
        assert ours["labels"][place].item() == segments[at]["label_id"]
        mask = ours["masks"][place, 0]
        assert torch.equal(mask, theirs["segmentation"][at])
        rows, columns = mask.nonzero().unbind(1)
        corners = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        assert ours["boxes"][place].tolist() == [corner.item() for corner in corners]


def test_which_models(transformers, torchvision_python):
    detector = small_detector("SSD")
    assert isinstance(one_image(detector), OneImage)
    model = small_model("rt_detr")
    ours = one_image(model, 0.3, {"pixel_mask": torch.ones(1, 64, 96)})
    assert isinstance(ours, OneImageOfTransformers) and ours.threshold == 0.3 and ours.names == ("pixel_mask",)
    assert (ours.divisor, one_image(small_model("rf_detr")).divisor, one_image(detector).divisor) == (32, 32, 1)
    with pytest.raises(ValueError, match="threshold is for models of transformers, got SSD"):
        one_image(detector, 0.3)
    from transformers import ResNetConfig, ResNetForImageClassification

    classifier = ResNetForImageClassification(ResNetConfig(hidden_sizes=[8] * 4, depths=[1] * 4, embedding_size=8))
    with pytest.raises(ValueError, match="ResNetForImageClassification gives neither pred_boxes nor masks_queries_l"):
        one_image(classifier.eval())(torch.rand(3, 64, 64))
