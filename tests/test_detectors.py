"""Stock detectors of torchvision, compiled as one graph."""

from __future__ import annotations

import copy
import math
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from inductor_vision import accelerate_torchvision
from inductor_vision.integrations.one_image import OneImage
from inductor_vision.ops.torchvision_detection import (
    batch_images,
    decode,
    decode_linear,
    decode_single,
    fcos_detections,
    grid_default_boxes,
    paste_masks_in_image,
    resize_image_and_masks,
    retinanet_detections,
    set_cell_anchors,
    ssd_detections,
)
from inductor_vision.paths import Path
from inductor_vision.tests.support.compiled import Compiled, Traced, compile_and_run, trace_and_run
from inductor_vision.tests.support.detectors import (
    HAND_MADE,
    agreement,
    assert_same_detections,
    hand_made_detector,
    small_detector,
    stock_detector,
)
from inductor_vision.tests.support.frozen import copies_of_maps
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

# What each image takes, beside its resizing and the pooling of regions.
OPERATORS = {
    "MaskRCNN": ["nms", "nms", "paste_masks"],
    "KeypointRCNN": ["nms", "nms", "heatmaps_to_keypoints"],
    "RetinaNet": ["nms"],
    "FCOS": ["nms"],
    "SSD": ["nms"],
}


@pytest.fixture(autouse=True)
def accelerated(torchvision_python) -> None:
    accelerate_torchvision()


def images(*sizes: tuple[int, int]) -> list[Tensor]:
    return [torch.rand(3, *size) for size in sizes]


def in_one_source(detector: nn.Module, images: list[Tensor]) -> Compiled:
    """Compiled, its dozens of kernels in one file of C++ with what calls them, which saves most of the time."""
    return compile_and_run(detector, images, config={"cpp_wrapper": True})


def assert_operators(kind: str, paths: list[Path], images: int, as_what: str) -> None:
    pooled = ["roi_align", "roi_align"] if kind.endswith("RCNN") else []  # for all images at once
    assert sorted(path.op for path in paths) == sorted(["upsample_bilinear2d", *OPERATORS[kind]] * images + pooled)
    assert {path.kind for path in paths} == {as_what}


def assert_all_same(ours: list[dict[str, Tensor]], stock: list[dict[str, Tensor]]) -> None:
    assert len(ours) == len(stock)
    for some, others in zip(ours, stock):
        assert len(others["boxes"]) > 4
        assert_same_detections(some, others)


@pytest.mark.parametrize("kind", OPERATORS)
def test_is_one_graph(kind):
    """Nothing ran eagerly before, which would let the stock pooler find out its scales."""
    detector, first, second = small_detector(kind), images((90, 120)), images((90, 120))
    with torch.no_grad():
        traced = trace_and_run(detector, first)
        with torch._dynamo.config.patch(error_on_recompile=True):
            results = traced.result + traced.function(second)
        stock = detector(first) + detector(second)
    assert_operators(kind, traced.paths, 1, "eager")
    assert_all_same(results, stock)


@pytest.mark.slow
def test_compiled():
    """With a Faster R-CNN in it. In an image of NaN, with which torchvision's kernels crash, nothing is found."""
    detector, sizes = small_detector("MaskRCNN").to(memory_format=torch.channels_last), ((90, 120), (70, 64))
    first, second = images(*sizes), images(*sizes)
    with torch.no_grad():
        compiled = in_one_source(detector, first)
        with torch._dynamo.config.patch(error_on_recompile=True):
            results = compiled.result + compiled.function(second)
            nothing = compiled.function([torch.full_like(image, float("nan")) for image in first])
        stock = detector(first) + detector(second)
    assert_operators("MaskRCNN", compiled.paths, 2, "template")
    assert_all_same(results, stock)
    assert [len(detections["boxes"]) for detections in nothing] == [0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["MaskRCNN", "RetinaNet", "SSD"])
def test_maps_are_not_copied(kind):
    """From one memory format into another, from the image on, but for the transposed convolution of masks, whose map
    and weight ``workarounds/data_dependent_convolutions.py`` has contiguous."""
    accelerate_torchvision()
    copies = copies_of_maps(small_detector(kind), images((90, 120)))
    transposed = 2 if kind == "MaskRCNN" else 0
    assert [operator for operator, _ in copies] == ["aten.convolution.default"] * transposed


@pytest.mark.slow
@pytest.mark.parametrize("name", HAND_MADE)
def test_hand_made(name):
    """Two images at once, traced as for Inductor; their operators run as they do eagerly."""
    detector, two = hand_made_detector(name), images((90, 120), (70, 64))
    with torch.no_grad():
        stock = detector(two)
        compiled = torch.compile(detector, fullgraph=True, backend="aot_eager")(two)
    assert sum(len(detections["boxes"]) for detections in stock) > 4
    for ours, theirs in zip(compiled, stock):
        assert_same_detections(ours, theirs)


# Of torchvision's twelve models those whose layers no small detector here has; tests/stock_detectors.py has all.
@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["maskrcnn_resnet50_fpn_v2", "retinanet_resnet50_fpn_v2", "ssdlite320_mobilenet_v3_large"]
)
def test_stock_model_is_one_program(name):
    detector, image = stock_detector(name)
    with torch.no_grad():
        ours = torch.export.export(OneImage(detector), (image,)).module()(image)
        (stock,) = detector([image])
    assert len(stock["boxes"]) > 4
    assert_same_detections(ours, stock)


@pytest.mark.slow
def test_hand_made_with_batch_norms_in_its_heads():
    """With Inductor, and with nothing that is detected."""
    detector, one = hand_made_detector("batch norm"), images((90, 120))
    with torch.no_grad():
        compiled = in_one_source(detector, one)
        (nothing,) = compiled.function([torch.full_like(one[0], float("nan"))])
        (stock,) = detector(one)
    assert set(compiled.kinds) == {"template"} and len(stock["boxes"]) > 4
    assert_same_detections(compiled.result[0], stock)
    assert len(nothing["boxes"]) == len(nothing["masks"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["KeypointRCNN", "SSD"])
def test_training(kind):
    """What stands for torchvision's Python does so in training too; which anchors are sampled, a seed decides."""
    detector, two = small_detector(kind).train(), images((90, 120), (70, 64))
    target = {"boxes": torch.tensor([[10.0, 12, 50, 60], [3, 4, 30, 25]]), "labels": torch.tensor([1, 1])}
    if kind == "KeypointRCNN":
        target["keypoints"] = torch.cat([20 * torch.rand(2, 5, 2) + 10, torch.ones(2, 5, 1)], dim=2)
        for name, layer in detector.roi_heads.keypoint_head.named_children():
            if isinstance(layer, torch.nn.ReLU):  # at whose kink a rounding decides about a gradient, eight layers deep
                detector.roi_heads.keypoint_head.set_submodule(name, torch.nn.SiLU())
    results = []
    for step in (detector, torch.compile(detector, backend="eager")):
        detector.zero_grad()
        torch.manual_seed(0)
        losses = step(two, [dict(target), dict(target)])
        sum(losses.values()).backward()
        results.append((losses, {name: parameter.grad for name, parameter in detector.named_parameters()}))
    (stock, stock_grads), (ours, grads) = results
    torch.testing.assert_close(ours, stock)
    assert grads.keys() == stock_grads.keys()
    largest = max(grad.abs().max() for grad in stock_grads.values())
    for name, grad in grads.items():
        # The gradient of a bias in front of a softmax over all pixels is zero but for rounding.
        allowed = 1e-4 * stock_grads[name].abs().max() + 1e-6 * largest
        assert (grad - stock_grads[name]).abs().max() <= allowed, name


BFLOAT16 = pytest.mark.parametrize("converted", [False, True], ids=["autocast", "converted"])


def in_bfloat16(run: Callable[..., Any], detector: nn.Module, image: Tensor, converted: bool) -> Any:
    """What running a detector on an image gives under autocast, or with weights and image converted."""
    if converted:
        detector, image = copy.deepcopy(detector).bfloat16(), image.bfloat16()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=not converted):
        return run(detector, [image])


def assert_agree(ours: dict[str, Tensor], detector: nn.Module, image: Tensor) -> None:
    """At least 0.85 of the detections of either, bfloat16 or float32, are among those of the other."""
    with torch.no_grad():
        (stock,) = detector([image])
    assert ours["boxes"].dtype == ours["scores"].dtype == torch.bfloat16 and len(ours["boxes"]) > 4
    assert list(ours) == list(stock)
    assert agreement(ours, stock, iou=0.9, score=0.02) >= 0.85


@pytest.mark.slow
@BFLOAT16
@pytest.mark.parametrize("kind", [kind for kind in OPERATORS if kind != "FCOS"])  # whose boxes have no area here
def test_bfloat16(kind, converted):
    detector, (image,) = small_detector(kind), images((90, 120))
    traced = in_bfloat16(trace_and_run, detector, image, converted)
    assert_operators(kind, traced.paths, 1, "eager")
    assert_agree(traced.result[0], detector, image)


@pytest.mark.slow
@BFLOAT16
def test_bfloat16_compiled(converted):
    detector, (image,) = small_detector("MaskRCNN"), images((90, 120))
    compiled = in_bfloat16(in_one_source, detector, image, converted)
    assert set(compiled.kinds) == {"template"}
    assert_agree(compiled.result[0], detector, image)


@pytest.mark.slow
@BFLOAT16
def test_bfloat16_with_another_pooler(converted):
    """torchvision's wants boxes in the dtype of the maps, which has no such coordinates."""
    detector, (image,) = hand_made_detector("roi_pool"), images((90, 120))
    traced = in_bfloat16(trace_and_run, detector, image, converted)
    assert {path.op for path in traced.paths} == {"upsample_bilinear2d", "nms", "roi_pool"}
    assert_agree(traced.result[0], detector, image)


class Given(nn.Module):
    """In the place of a head: numbers that bfloat16 has, in the dtype that a head would give them."""

    def __init__(self, *values: Tensor | list[Tensor]) -> None:
        super().__init__()
        self.values = values

    def forward(self, features: list[Tensor] | Tensor) -> tuple[Tensor | list[Tensor], ...]:
        some = features if isinstance(features, Tensor) else features[0]
        return tree_map(lambda value: value.to(some.dtype), self.values)


class GivenByName(Given):
    def forward(self, features: list[Tensor]) -> dict[str, Tensor]:
        names = "cls_logits", "bbox_regression", "bbox_ctrness"
        return dict(zip(names, super().forward(features)))


def detector_of_large_boxes(kind: str) -> nn.Module:
    """For images of 600 x 800 pixels, which it resizes to 768 x 1024. What its layers find is given: 30 boxes, so few
    that bfloat16 has a score for each."""
    detector = small_detector(kind)
    detector.transform.min_size, detector.transform.max_size = (768,), 1024
    detector.transform.fixed_size = None
    sizes = [(96, 128), (48, 64)]
    anchors = (detector.rpn if kind == "FasterRCNN" else detector).anchor_generator.num_anchors_per_location()
    counts = [height * width * number for (height, width), number in zip(sizes, anchors)]

    def scores(count: int, classes: int) -> Tensor:
        """Below any threshold but for 30, all different."""
        logits = torch.full((count, classes), -20.0)
        if kind in ("FasterRCNN", "SSD") and classes > 1:
            logits[:, 0] = 0  # the background
        logits[torch.randperm(count)[:30], torch.randint(1, classes, (30,)) if classes > 1 else 0] = (
            2 - torch.arange(30) / 8
        )
        return logits

    def codes(*shape: int) -> Tensor:
        return (0.3 * torch.randn(shape)).bfloat16().float()

    if kind == "FasterRCNN":
        logits, moves = scores(sum(counts), 1), codes(sum(counts), 4)
        shapes = [(1, height, width, number) for (height, width), number in zip(sizes, anchors)]
        detector.rpn.head = Given(
            [part.view(shape).permute(0, 3, 1, 2) for part, shape in zip(logits.split(counts), shapes)],
            [part.view(*shape[:3], -1).permute(0, 3, 1, 2) for part, shape in zip(moves.split(counts), shapes)],
        )
        detector.roi_heads.box_predictor = Given(scores(30, 4), codes(30, 16))
        detector.rpn._post_nms_top_n = detector.rpn._pre_nms_top_n = {"testing": 30}
        detector.rpn.nms_thresh = 1.0
    else:
        more = [torch.full((1, sum(counts), 1), 3.0)] if kind == "FCOS" else []
        moves = 8 * codes(1, sum(counts), 4).abs() if kind == "FCOS" else codes(1, sum(counts), 4)
        detector.head = GivenByName(scores(sum(counts), 4)[None], moves, *more)
    return detector


@pytest.mark.slow
@BFLOAT16
@pytest.mark.parametrize("kind", ["FasterRCNN", "RetinaNet", "FCOS", "SSD"])
def test_coordinates_are_rounded_once(kind, converted):
    """From the same results of their layers, a detector in bfloat16 finds the boxes of float64, rounded."""
    detector, (image,) = detector_of_large_boxes(kind), images((600, 800))
    (ours,) = in_bfloat16(trace_and_run, detector, image, converted).result
    with torch.no_grad():
        (exact,) = copy.deepcopy(detector).double()([image.double()])
    assert len(exact["boxes"]) > 10 and exact["boxes"].max() > 512
    assert torch.equal(ours["labels"], exact["labels"])
    assert (ours["boxes"] == exact["boxes"].bfloat16()).float().mean() > 0.98  # float32 may round to the other side


def test_nothing_is_detected():
    """Nor in an image of NaN."""
    detector = small_detector("MaskRCNN")
    detector.roi_heads.score_thresh = 2.0
    shapes = {"boxes": (0, 4), "labels": (0,), "scores": (0,), "masks": (0, 1, 90, 120)}
    with torch.no_grad():
        traced = trace_and_run(detector, images((90, 120)))
        results = traced.result + traced.function([torch.full((3, 90, 120), float("nan"))])
    for result in results:
        assert {key: tuple(value.shape) for key, value in result.items()} == shapes


@pytest.mark.parametrize("kind", ["MaskRCNN", "KeypointRCNN"])
def test_can_be_scripted(kind):
    detector = small_detector(kind)
    (image,) = images((90, 120))
    with torch.no_grad():
        _, scripted = torch.jit.script(detector)([image])
        assert_same_detections(scripted[0], detector([image])[0])


@pytest.mark.parametrize("compiled", [False, True])
def test_images_of_a_wrong_rank_or_dtype(compiled):
    detector = small_detector("FasterRCNN")
    call = torch.compile(detector) if compiled else detector
    with torch.no_grad():
        with pytest.raises(Exception, match="expected to be a list of 3d tensors of shape"):
            call([torch.rand(1, 3, 90, 120)])
        with pytest.raises(Exception, match="Expected input images to be of floating type"):
            call([torch.zeros(3, 90, 120, dtype=torch.uint8)])


def test_decode(torchvision_python):
    from torchvision.models.detection._utils import BoxCoder

    coder = BoxCoder((10.0, 10.0, 5.0, 5.0))
    boxes = [torch.rand(count, 4).cumsum(1) * 50 for count in (5, 0, 3)]
    for classes in (1, 4):
        codes = torch.randn(8, 4 * classes)
        assert torch.equal(decode(coder, codes, boxes), coder.decode(codes, boxes))
        assert decode(coder, codes[:0], boxes[1:2]).shape == (0, classes, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_decode_linear(torchvision_python, dtype):
    from torchvision.models.detection._utils import BoxLinearCoder

    boxes, codes = torch.rand(6, 4, dtype=dtype).cumsum(1) * 50, torch.randn(6, 4, dtype=dtype)
    for normalize_by_size in (True, False):
        coder = BoxLinearCoder(normalize_by_size)
        assert torch.equal(decode_linear(coder, codes, boxes), coder.decode(codes, boxes))


@pytest.mark.parametrize("steps", [None, [8, 16]])
@pytest.mark.parametrize("clip", [True, False])
def test_grid_default_boxes(torchvision_python, steps, clip):
    from torchvision.models.detection.anchor_utils import DefaultBoxGenerator

    generator = DefaultBoxGenerator([[2], [2, 3]], steps=steps, clip=clip)
    sizes = [(12, 15), (6, 8)], (96, 120)
    for dtype in (torch.float32, torch.float64):
        ours = grid_default_boxes(generator, *sizes, dtype=dtype)
        torch.testing.assert_close(ours, generator._grid_default_boxes(*sizes, dtype=dtype), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precisions_have_coordinates_of_float32(torchvision_python, dtype):
    """Where eager mode has rounded the anchors too."""
    from torchvision.models.detection._utils import BoxCoder, BoxLinearCoder
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    generator = AnchorGenerator(((813.0,),), ((0.5, 1.0, 2.0),))
    (exact,) = generator.cell_anchors
    generator.set_cell_anchors(torch.bfloat16, exact.device)
    assert not torch.equal(generator.cell_anchors[0].float(), exact)
    set_cell_anchors(generator, dtype, exact.device)
    assert torch.equal(generator.cell_anchors[0], exact)

    codes, boxes = torch.randn(5, 4).to(dtype), torch.rand(5, 4).cumsum(1) * 500
    assert torch.equal(decode_linear(BoxLinearCoder(), codes, boxes), BoxLinearCoder().decode(codes.float(), boxes))
    coder = BoxCoder((10.0, 10.0, 5.0, 5.0))
    assert torch.equal(decode_single(coder, codes, boxes), coder.decode_single(codes.float(), boxes))


def masks_and_boxes(size: int) -> tuple[Tensor, Tensor]:
    boxes = (torch.rand(40, 2, 2).sort(dim=1).values * torch.tensor([110.0, 90.0])).flatten(1)
    boxes[0] = torch.tensor([0.0, 0, 110, 90])
    boxes[1] = torch.tensor([5.0, 6, 5, 6])
    boxes[2] = torch.tensor([0.0, 0, 0, 0])
    return torch.rand(40, 1, size, size), boxes


@pytest.mark.parametrize("size", [14, 28])
def test_paste_masks_in_image(torchvision_python, size):
    from torchvision.models.detection.roi_heads import paste_masks_in_image as stock

    masks, boxes = masks_and_boxes(size)
    ours = paste_masks_in_image(masks, boxes, (90, 110))
    torch.testing.assert_close(ours, stock(masks, boxes, (90, 110)), rtol=0, atol=2e-5)
    assert paste_masks_in_image(masks[:0], boxes[:0], (90, 110)).shape == (0, 1, 90, 110)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_pasted_masks_keep_their_dtype_and_their_precision(torchvision_python, dtype):
    from torchvision.models.detection.roi_heads import paste_masks_in_image as stock

    masks, boxes = masks_and_boxes(28)
    masks = masks.to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = paste_masks_in_image(masks, boxes, (90, 110))
    assert ours.dtype == dtype
    tolerance = {torch.bfloat16: 4e-3, torch.float16: 5e-4}.get(dtype, 2e-5)
    torch.testing.assert_close(ours.double(), stock(masks.double(), boxes, (90, 110)), rtol=0, atol=tolerance)


@pytest.mark.parametrize("sizes", [[(32, 64)], [(31, 65), (40, 7)], [(1, 1), (90, 64), (64, 90)]], ids=str)
def test_batch_images(sizes):
    transform, batch = small_detector("FasterRCNN").transform, images(*sizes)
    assert torch.equal(batch_images(transform, batch), transform.batch_images(batch))
    assert torch.equal(batch_images(transform, batch, 7), transform.batch_images(batch, 7))


@pytest.mark.parametrize("size", [(90, 120), (333, 500), (480, 641), (50, 200), (640, 97)], ids=str)
@pytest.mark.parametrize("fixed_size", [None, (60, 50)])
def test_resize_image_and_masks(size, fixed_size):
    from torchvision.models.detection.transform import _resize_image_and_masks as stock

    (image,) = images(size)
    masks = (torch.rand(2, *size) > 0.5).byte()
    ours, target = resize_image_and_masks(image, 96, 128, {"masks": masks}, fixed_size)
    theirs, expected = stock(image, 96, 128, {"masks": masks}, fixed_size)
    assert torch.equal(ours, theirs) and torch.equal(target["masks"], expected["masks"])
    assert resize_image_and_masks(image, 96, 128)[1] is None


def transformed(transform: Any, images: list[Tensor], **options: Any) -> tuple[Traced, Any]:
    """What a transform gives in compiled code, its batch of images first, and what it gives eagerly."""

    def call(images: list[Tensor]) -> tuple[Tensor, list[tuple[int, int]]]:
        batch, _ = transform(images)
        return batch.tensors, batch.image_sizes

    return trace_and_run(call, images, **options), call(images)


@pytest.mark.parametrize(
    ("sizes", "fixed_size", "dtype"),
    [
        ([(90, 120)], None, torch.float32),
        ([(50, 200), (64, 90), (640, 97)], None, torch.bfloat16),
        ([(50, 200), (64, 90)], (60, 50), torch.float32),
    ],
    ids=str,
)
def test_transform(sizes, fixed_size, dtype):
    """Images are resized into the batch by an operator each, whatever their sizes."""
    transform = small_detector("FasterRCNN").transform
    transform.fixed_size = fixed_size
    traced, (batch, shapes) = transformed(transform, [image.to(dtype) for image in images(*sizes)], dynamic=True)
    assert [path.op for path in traced.paths] == ["upsample_bilinear2d"] * len(sizes)
    padding = [node for graph in traced.graphs for node in graph.nodes if "pad" in str(node.target)]
    assert padding == []  # the operator does that
    ours, our_shapes = traced.result
    assert our_shapes == shapes
    assert (ours.dtype, ours.shape) == (dtype, batch.shape) and torch.equal(ours, batch)
    with torch.compiler.set_stance("fail_on_recompile"):
        again = [image.to(dtype) for image in images(*((2 * height, width + 9) for height, width in sizes))]
        assert torch.equal(traced.function(again)[0], transform(again)[0].tensors)


@pytest.mark.parametrize("step", ["normalize", "resize", "batch_images"])
def test_transforms_own_steps_are_taken(step):
    """Of a class that inherits, and of one object, as a method or a function."""
    own = {
        "normalize": lambda self, image: image * 2,
        "resize": lambda self, image, target=None: (image[:, ::2], target),
        "batch_images": lambda self, images, size_divisible=32: torch.stack(images) + 1,
    }[step]
    inherited, changed = (small_detector("FasterRCNN").transform for _ in range(2))
    inherited.__class__ = type("Own", (type(inherited),), {step: own})
    setattr(changed, step, types.MethodType(own, changed))
    function = small_detector("FasterRCNN").transform  # which has it from nowhere
    setattr(function, step, lambda *args, **options: own(function, *args, **options))
    for transform in (inherited, changed, function):
        traced, (batch, shapes) = transformed(transform, images((64, 128)))
        torch.testing.assert_close(traced.result[0], batch)
        assert traced.result[1] == shapes


@pytest.mark.parametrize(("score_thresh", "topk_candidates"), [(0.01, 400), (0.02, 30), (0.9, 400), (2.0, 400)])
def test_ssd_detections(score_thresh, topk_candidates):
    ssd = small_detector("SSD")
    ssd.score_thresh, ssd.topk_candidates = score_thresh, topk_candidates
    outputs = {"cls_logits": 3 * torch.randn(2, 300, 9), "bbox_regression": torch.randn(2, 300, 4)}
    outputs["cls_logits"][0, 7, 2] = float("nan")
    anchors = [torch.rand(300, 4).cumsum(1) * 40 for _ in range(2)]
    call = outputs, anchors, [(96, 96), (50, 70)]
    for ours, stock in zip(ssd_detections(ssd, *call), ssd.postprocess_detections(*call)):
        assert list(ours) == list(stock)
        for key in ours:
            assert torch.equal(ours[key], stock[key])


ANCHORS, CLASSES = (300, 70), 9


def heads_and_anchors(dtype: torch.dtype) -> tuple[dict[str, list[Tensor]], list[list[Tensor]], list[tuple[int, int]]]:
    """What heads give for two images on two levels, with all that a number may be, and with scores that are equal."""
    outputs = {
        "cls_logits": [(3 * torch.randn(2, anchors, CLASSES) - 4).to(dtype) for anchors in ANCHORS],
        "bbox_regression": [torch.randn(2, anchors, 4).to(dtype) for anchors in ANCHORS],
        "bbox_ctrness": [torch.randn(2, anchors, 1).to(dtype) for anchors in ANCHORS],
    }
    logits = outputs["cls_logits"][0][0]
    logits[3], logits[7, 2], logits[7, 4], logits[11, 1] = math.nan, math.nan, 5, math.inf
    logits[20:40] = logits[20]
    outputs["bbox_ctrness"][0][0, 12] = math.nan
    anchors = [[torch.rand(count, 4).cumsum(1) * 40 for count in ANCHORS] for _ in range(2)]
    return outputs, anchors, [(96, 96), (50, 70)]


DETECTIONS = {"RetinaNet": retinanet_detections, "FCOS": fcos_detections}


@pytest.mark.parametrize("kind", DETECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.05, 0.3, 1.0])
@pytest.mark.parametrize("topk_candidates", [1000, 30])
def test_detections_of_levels(kind, dtype, threshold, topk_candidates, monkeypatch):
    """All that could be one, none of them suppressed: torchvision's nms takes no bfloat16."""
    monkeypatch.setattr("torchvision.ops.boxes.batched_nms", lambda boxes, scores, *_: torch.arange(len(scores)))
    detector, call = small_detector(kind), heads_and_anchors(dtype)
    detector.score_thresh, detector.topk_candidates, detector.detections_per_img = threshold, topk_candidates, 10_000
    for ours, stock in zip(DETECTIONS[kind](detector, *call), detector.postprocess_detections(*call)):
        assert len(ours["boxes"]) > 0 or threshold == 1.0
        assert list(ours) == list(stock)
        for key in ours:  # a score at the end of a tensor is computed without vectors
            torch.testing.assert_close(ours[key], stock[key], rtol=1e-6 if key == "scores" else 0, atol=0)


class LargestInputs(TorchDispatchMode):
    """How many values operators are given, at most, by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and isinstance(args[0], Tensor):
            name = func.overloadpacket.__name__
            self.sizes[name] = max(self.sizes.get(name, 0), args[0].numel())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", DETECTIONS)
def test_few_scores_are_computed_and_looked_through(kind):
    """Of all logits only which is an anchor's best is asked."""
    detector, (outputs, anchors, shapes) = small_detector(kind), heads_and_anchors(torch.float32)
    for logits in outputs["cls_logits"]:
        logits[:, 10:] = -20.0
    detector.score_thresh = 0.2
    with LargestInputs() as largest:
        DETECTIONS[kind](detector, outputs, anchors, shapes)
    assert largest.sizes["amax"] == ANCHORS[0] * CLASSES
    assert {name: size for name, size in largest.sizes.items() if name in ("sigmoid", "nonzero", "nonzero_numpy")} == {
        "sigmoid": ANCHORS[0],
        "nonzero": ANCHORS[0],
    }
