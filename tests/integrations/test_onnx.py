"""Operators of this package and of torchvision in models for ONNX."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from inductor_vision import (
    accelerate_torchvision,
    batched_nms,
    deform_conv2d,
    multiscale_roi_align,
    nms,
    onnx_translation_table,
    roi_align,
)
from inductor_vision.integrations.one_image import OneImage
from inductor_vision.ops.heatmaps_to_keypoints import heatmaps_to_keypoints
from inductor_vision.ops.paste_masks import paste_masks
from inductor_vision.ops.upsample2d import upsample_bilinear2d
from inductor_vision.tests.support.boxes import Boxes, nms_oracle
from inductor_vision.tests.support.compare import assert_close
from inductor_vision.tests.support.deform_conv2d import oracle as deformed, sample
from inductor_vision.tests.support.detectors import assert_same_detections, small_detector
from inductor_vision.tests.support.heatmaps_to_keypoints import Heatmaps, assert_keypoints
from inductor_vision.tests.support.paste_masks import Case as Paste, oracle as pasted_masks
from inductor_vision.tests.support.regions import pyramid, pyramid_oracle, roi_align_oracle, sample as sample_regions
from inductor_vision.tests.support.upsample2d import Case, oracle as resized
from torch import Tensor, nn
from torch.export import Dim

pytest.importorskip("onnxscript", reason="onnxscript is not installed, which torch.onnx.export needs")

OPSET = 19  # the first with DeformConv


class Model(nn.Module):
    """A function of tensors, with its other arguments."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: Tensor) -> Any:
        return self.function(*tensors)


def export(model: nn.Module | torch.export.ExportedProgram, tensors: Sequence[Tensor] = (), **options: Any) -> Any:
    return torch.onnx.export(
        model,
        tuple(tensors),
        dynamo=True,
        verbose=False,
        opset_version=OPSET,
        custom_translation_table=onnx_translation_table(),
        **options,
    )


def operators(program: Any) -> set[str]:
    """Those that matter here."""
    nodes = list(program.model.graph)
    assert {node.domain for node in nodes} <= {""}, "what is not of ONNX"
    return {node.op_type for node in nodes} & {"DeformConv", "RoiAlign", "NonMaxSuppression", "Resize"}


def run(program: Any, tensors: Sequence[Tensor]) -> list[Tensor]:
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    inputs = {argument.name: tensor.numpy() for argument, tensor in zip(session.get_inputs(), tensors)}
    return [torch.from_numpy(array) for array in session.run(None, inputs)]


@pytest.mark.parametrize("name", ["groups_across_offset_groups", "neither", "stride_3x4", "kernel_3x2"])
def test_deform_conv2d(name):
    s = sample(name)
    names = list(s.tensors)

    def function(*tensors: Tensor) -> Tensor:
        call = s.replace(**dict(zip(names, tensors)))
        return deform_conv2d(*call.args, **call.kwargs)

    program = export(Model(function), s.tensors.values())
    assert operators(program) == {"DeformConv"}
    (result,) = run(program, list(s.tensors.values()))
    assert_close(result, deformed(*s.args, **s.kwargs), torch.float32)


@pytest.mark.parametrize("name", ["plain", "aligned", "adaptive", "ratio_1"])
def test_roi_align(name):
    s = sample_regions("roi_align", name)
    program = export(Model(lambda *tensors: roi_align(*tensors, *s.arguments[2:])), s.arguments[:2])
    assert operators(program) == {"RoiAlign"}
    (result,) = run(program, s.arguments[:2])
    assert_close(result, roi_align_oracle(*s.arguments), torch.float32)


@pytest.mark.parametrize("name", ["plain", "adaptive", "no_regions"])
def test_multiscale_roi_align(name):
    """With regions on no level among them."""
    s = pyramid(name)
    tensors = [*s.features, *s.boxes]

    def function(*tensors: Tensor) -> Tensor:
        maps = len(s.features)
        return multiscale_roi_align(tensors[:maps], tensors[maps:], *s.arguments[2:], **s.kwargs)

    program = export(Model(function), tensors)
    assert operators(program) == {"RoiAlign"}
    (result,) = run(program, tensors)
    assert_close(result, pyramid_oracle(s), torch.float32)


@pytest.mark.parametrize("align_corners", [False, True])
def test_upsample_bilinear2d(align_corners):
    """For sizes that change, and to twice the number of rows and 33 columns."""

    def function(input: Tensor) -> Tensor:
        rows = input.shape[2]
        return upsample_bilinear2d(input, (2 * rows, 33), align_corners, padding=(3, rows))

    program = export(Model(function), [Case().input()], dynamic_shapes=(({2: Dim.DYNAMIC, 3: Dim.DYNAMIC},),))
    assert operators(program) == {"Resize"}
    for size in ((7, 10), (3, 50)):
        case = Case(size=size, to=(2 * size[0], 33), padding=(3, size[0]), align_corners=align_corners)
        (result,) = run(program, [case.input()])
        assert_close(result, resized(case.input(), case), torch.float32)


def test_heatmaps_to_keypoints():
    """For any number of boxes, none too."""
    example = Heatmaps().tensors()
    shapes = (({0: Dim.DYNAMIC}, {0: Dim.DYNAMIC}),)
    program = export(Model(heatmaps_to_keypoints), example, dynamic_shapes=shapes)
    for call in (Heatmaps(9), Heatmaps(boxes="no_area"), Heatmaps(boxes="wide"), Heatmaps(0)):
        keypoints, values = run(program, call.tensors())
        assert_keypoints((keypoints, values), *call.tensors())


def test_paste_masks():
    """For any number of masks, none too."""
    example = Paste().tensors()
    shapes = (({0: Dim.DYNAMIC}, {0: Dim.DYNAMIC}),)
    program = export(Model(lambda masks, boxes: paste_masks(masks, boxes, (40, 50))), example, dynamic_shapes=shapes)
    for case in (Paste(), Paste(boxes=Paste().boxes[:4]), Paste(boxes=())):
        (pasted,) = run(program, case.tensors())
        assert_close(pasted, pasted_masks(*case.positional), torch.float32)


def suppress(boxes: Tensor, scores: Tensor, classes: Tensor) -> tuple[Tensor, ...]:
    return nms(boxes, scores, 0.3), batched_nms(boxes, scores, classes, 0.1)


def test_suppression_of_any_number_of_boxes():
    """Some to the left of the image, where torchvision lets classes meet."""
    program = export(Model(suppress), Boxes(17).tensors(), dynamic_shapes=(({0: Dim.DYNAMIC},) * 3,))
    assert operators(program) == {"NonMaxSuppression"}
    for count in (40, 1, 0):
        boxes, scores, classes = Boxes(count).tensors()
        boxes = boxes - 60
        expected = nms_oracle(boxes, scores, 0.3), nms_oracle(boxes, scores, 0.1, classes)
        for kept, right in zip(run(program, (boxes, scores, classes)), expected):
            assert kept.dtype == torch.int64
            assert kept.tolist() == right


class Stock(nn.Module):
    def __init__(self, ops: Any) -> None:
        super().__init__()
        self.ops = ops
        self.convolution = ops.DeformConv2d(4, 4, 3, padding=1)

    def forward(self, image: Tensor, offset: Tensor, boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        kept = self.ops.nms(boxes, scores, 0.3)
        return kept, self.ops.roi_align(self.convolution(image, offset), [boxes[kept]], 3, sampling_ratio=2)


def test_stock_functions_are_exported_as_torchvisions(torchvision):
    """Accelerated or not, without a table."""
    accelerate_torchvision()
    boxes, scores, _ = Boxes(17).tensors()
    tensors = torch.randn(1, 4, 16, 20), torch.randn(1, 18, 16, 20), boxes, scores
    model = Stock(torchvision.ops)
    program = torch.onnx.export(model, tensors, dynamo=True, verbose=False, opset_version=OPSET)
    assert operators(program) == {"DeformConv", "RoiAlign", "NonMaxSuppression"}
    kept, regions = run(program, tensors)
    expected_kept, expected_regions = model(*tensors)
    assert torch.equal(kept, expected_kept)
    assert_close(regions, expected_regions, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["FCOS", "FasterRCNN", "KeypointRCNN", "MaskRCNN"])
def test_detectors_by_way_of_a_program(torchvision, kind):
    """torchvision's own Python keeps them from being exported."""
    accelerate_torchvision()
    detector, image = small_detector(kind), torch.rand(3, 64, 80)
    with torch.no_grad():
        (expected,) = detector([image])
        program = export(torch.export.export(OneImage(detector), (image,)))
    assert operators(program) >= {"NonMaxSuppression", "Resize"}
    assert_same_detections(dict(zip(expected, run(program, [image]))), expected)


def test_without_onnxscript(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match="onnxscript"):
        onnx_translation_table()
