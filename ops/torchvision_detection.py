"""Pieces of torchvision's detectors that break a graph, written so that they do not; each gives what the original does.

Those that make coordinates do so in float32 where the model computes in bfloat16 or float16, which cannot tell pixels
above 256, or 2048, apart. They are rounded once, when they are detections.

:func:`inductor_vision.accelerate_torchvision` puts all of these in the originals' place in compiled code.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .paste_masks import paste_masks
from .ps_roi_align import ps_roi_align
from .ps_roi_pool import ps_roi_pool
from .registry import accumulate_dtype, replaces_torchvision
from .roi_align import roi_align
from .roi_pool import roi_pool
from .upsample2d import upsample_bilinear2d


@replaces_torchvision("models.detection.anchor_utils.AnchorGenerator.set_cell_anchors")
def set_cell_anchors(generator: Any, dtype: torch.dtype, device: torch.device) -> None:
    """The original rounds anchors to the dtype of the maps, and then their places.

    Eager mode leaves rounded ones behind, which are made anew.
    """
    dtype = accumulate_dtype(dtype)
    cells = [
        generator.generate_anchors(sizes, ratios) if anchors.dtype != accumulate_dtype(anchors.dtype) else anchors
        for anchors, sizes, ratios in zip(generator.cell_anchors, generator.sizes, generator.aspect_ratios)
    ]
    generator.cell_anchors = [anchors.to(dtype=dtype, device=device) for anchors in cells]


@replaces_torchvision("models.detection.anchor_utils.DefaultBoxGenerator._grid_default_boxes")
def grid_default_boxes(
    generator: Any, grid_sizes: list[tuple[int, int]], image_size: tuple[int, int], dtype: torch.dtype = torch.float32
) -> Tensor:
    """The original rounds places to the dtype of the maps.

    Args:
        grid_sizes: height and width of each map.
        image_size: of the image.

    Returns:
        ``[A, 4]``, rows of (x, y, width, height), as parts of the image.
    """
    boxes = []
    for level, (height, width) in enumerate(grid_sizes):
        step = generator.steps[level] if generator.steps is not None else None
        rows, columns = (height, width) if step is None else (length / step for length in image_size)
        x, y = ((torch.arange(count) + 0.5) / of for count, of in ((width, columns), (height, rows)))
        sizes = generator._wh_pairs[level]
        sizes = sizes.clamp(0, 1) if generator.clip else sizes
        box = torch.broadcast_tensors(x[:, None], y[:, None, None], sizes[:, 0], sizes[:, 1])  # [height, width, P]
        boxes.append(torch.stack(box, dim=-1).flatten(0, 2))
    return torch.cat(boxes).to(accumulate_dtype(dtype))


@replaces_torchvision("models.detection._utils.BoxCoder.decode")
def decode(coder: Any, rel_codes: Tensor, boxes: list[Tensor]) -> Tensor:
    """The original asks whether there are boxes, of which the number depends on data.

    Args:
        rel_codes: ``[N, 4 C]``, what to change of each box for each class.
        boxes: ``[L, 4]`` of each image, N in all.

    Returns:
        ``[N, C, 4]``; the original, where N is 0, ``[0, 4 C]``.
    """
    return coder.decode_single(rel_codes.flatten(0, -2), torch.cat(boxes)).unflatten(1, (-1, 4))


@replaces_torchvision("models.detection._utils.BoxCoder.decode_single")
def decode_single(coder: Any, rel_codes: Tensor, boxes: Tensor) -> Tensor:
    """The original computes in the codes' dtype.

    Args:
        rel_codes: ``[N, 4 C]``, for each class by how many of a box's sides its center is moved, and the logarithms of
            how many times as long they become; each times a weight.
        boxes: ``[N, 4]``.

    Returns:
        ``[N, 4 C]``, in float32 for the low precisions.
    """
    dtype = accumulate_dtype(rel_codes.dtype)
    begin, end = boxes.to(dtype)[:, None].split(2, dim=2)  # [N, 1, (x, y)]
    codes = rel_codes.to(dtype).unflatten(1, (-1, 4))
    move, grow = (codes / torch.tensor(coder.weights, dtype=dtype, device=codes.device)).split(2, dim=2)
    sides = end - begin
    center = move * sides + (begin + 0.5 * sides)
    half = 0.5 * (grow.clamp(max=coder.bbox_xform_clip).exp() * sides)
    return torch.cat([center - half, center + half], dim=2).flatten(1)


@replaces_torchvision("models.detection._utils.BoxLinearCoder.decode")
def decode_linear(coder: Any, rel_codes: Tensor, boxes: Tensor) -> Tensor:
    """The original computes in the codes' dtype.

    Args:
        rel_codes: ``[..., 4]``, how far a box reaches from the center of the given one, which counts pixels or, with
            ``normalize_by_size``, its sides.
        boxes: ``[..., 4]``.

    Returns:
        ``[..., 4]``, in float32 for the low precisions.
    """
    dtype = accumulate_dtype(rel_codes.dtype)
    begin, end = boxes.to(dtype).split(2, dim=-1)
    before, behind = rel_codes.to(dtype).split(2, dim=-1)
    if coder.normalize_by_size:
        before, behind = before * (end - begin), behind * (end - begin)
    center = 0.5 * (begin + end)
    return torch.cat([center - before, center + behind], dim=-1)


@replaces_torchvision("models.detection.transform.GeneralizedRCNNTransform.postprocess")
def postprocess(
    transform: Any,
    result: list[dict[str, Tensor]],
    image_shapes: list[tuple[int, int]],
    original_image_sizes: list[tuple[int, int]],
) -> list[dict[str, Tensor]]:
    """In the original boxes are of the scores' dtype by now.

    Args:
        result: detections of each image, in pixels of what it was resized to.
        image_shapes: what it was resized to.
        original_image_sizes: what it was.

    Returns:
        ``result``, in pixels of the images.
    """
    from torchvision.models.detection.transform import paste_masks_in_image, resize_boxes, resize_keypoints

    if transform.training:
        return result
    for found, shape, size in zip(result, image_shapes, original_image_sizes):
        boxes = resize_boxes(found["boxes"], shape, size)
        found["boxes"] = boxes.to(found["scores"].dtype)
        if "masks" in found:
            found["masks"] = paste_masks_in_image(found["masks"], boxes, size)
        if "keypoints" in found:
            found["keypoints"] = resize_keypoints(found["keypoints"], shape, size)
    return result


@replaces_torchvision("models.detection.roi_heads.paste_masks_in_image")
def paste_masks_in_image(masks: Tensor, boxes: Tensor, img_shape: tuple[int, int], padding: int = 1) -> Tensor:
    """The original asks how many masks there are, and pastes them one by one.

    Args:
        masks: ``[N, 1, M, M]``.
        boxes: ``[N, 4]``.
        img_shape: height and width of the image.

    Returns:
        ``[N, 1, H, W]``.
    """
    from torchvision.models.detection.roi_heads import expand_boxes, expand_masks

    masks, scale = expand_masks(masks, padding)
    return paste_masks(masks, expand_boxes(boxes, scale).long(), img_shape)


@replaces_torchvision("models.detection.transform.GeneralizedRCNNTransform.forward")
def transform_images(
    transform: Any, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None
) -> tuple[Any, list[dict[str, Tensor]] | None]:
    """The original resizes images, then copies each into a batch of zeros; here they are resized into the batch.

    With targets, and where a transform has steps of its own, it is the original that runs, on the functions below.

    Args:
        images: ``[C, H, W]`` each, of sizes of their own.

    Returns:
        torchvision's ``ImageList``, and the targets.
    """
    from torchvision.models.detection.image_list import ImageList
    from torchvision.models.detection.transform import GeneralizedRCNNTransform as Stock

    steps = "resize", "batch_images"
    own = any(getattr(type(transform), step) is not getattr(Stock, step) or step in vars(transform) for step in steps)
    if targets is not None or transform.training or own:
        return Stock.forward.__wrapped__(transform, images, targets)
    images = list(images)
    for image in images:
        if image.dim() != 3:
            raise ValueError(f"images is expected to be a list of 3d tensors of shape [C, H, W], got {image.shape}")
    sizes = [
        _resized_size(image.shape[1:], transform.min_size[-1], transform.max_size, transform.fixed_size)
        for image in images
    ]
    largest = _divisible(sizes, transform.size_divisible)
    batch = [
        upsample_bilinear2d(transform.normalize(image)[None], size, padding=[a - b for a, b in zip(largest, size)])
        for image, size in zip(images, sizes)
    ]
    return ImageList(batch[0] if len(batch) == 1 else torch.cat(batch), [tuple(size) for size in sizes]), None


def _divisible(sizes: Sequence[Sequence[int]], divisor: int) -> list[int]:
    """The largest height and width, rounded up to multiples of a number."""
    largest = (functools.reduce(torch.sym_max, lengths) for lengths in zip(*sizes))
    return [-(-length // divisor) * divisor for length in largest]


@replaces_torchvision("models.detection.transform.GeneralizedRCNNTransform.batch_images")
def batch_images(transform: Any, images: list[Tensor], size_divisible: int = 32) -> Tensor:
    """The original makes numbers of sizes, which then hold for one size only.

    Args:
        images: ``[C, H, W]`` each, of sizes of their own.
        size_divisible: what the result's height and width are multiples of.

    Returns:
        ``[B, C, H, W]``, the images with zeros at the right and below.
    """
    height, width = _divisible([image.shape[1:] for image in images], size_divisible)
    return torch.stack([F.pad(image, (0, width - image.shape[2], 0, height - image.shape[1])) for image in images])


@replaces_torchvision("models.detection.transform._resize_image_and_masks")
def resize_image_and_masks(
    image: Tensor,
    self_min_size: int,
    self_max_size: int,
    target: dict[str, Tensor] | None = None,
    fixed_size: tuple[int, int] | None = None,
) -> tuple[Tensor, dict[str, Tensor] | None]:
    """The original decides which side of the image limits its size, for all images that a graph is for.

    Args:
        image: ``[C, H, W]``.
        self_min_size, self_max_size: what the shorter side becomes, unless the longer becomes more than the latter.
        target: of which "masks", ``[N, H, W]``, are resized too.
        fixed_size: width and height, whatever the image's are.
    """
    size = _resized_size(image.shape[-2:], self_min_size, self_max_size, fixed_size)
    image = upsample_bilinear2d(image[None], size)[0]
    if target is not None and "masks" in target:
        target["masks"] = F.interpolate(target["masks"][:, None].float(), size=size)[:, 0].byte()
    return image, target


def _resized_size(shape: Sequence[int], min_size: int, max_size: int, fixed_size: tuple[int, int] | None) -> list[int]:
    if fixed_size is not None:
        return [fixed_size[1], fixed_size[0]]
    scale = torch.sym_min(min_size / torch.sym_min(*shape), max_size / torch.sym_max(*shape))
    return [torch.sym_int(length * scale) for length in shape]


# The originals want boxes in the dtype of the maps.
for _drop_in in (roi_align, roi_pool, ps_roi_align, ps_roi_pool):
    replaces_torchvision(f"ops.{_drop_in.__name__}.{_drop_in.__name__}")(_drop_in)


@replaces_torchvision("models.detection._utils._topk_min")
def topk_min(input: Tensor, orig_kval: int, axis: int) -> int:
    """The original decides which is less, for all images that a graph is for."""
    return torch.sym_min(orig_kval, input.size(axis))


@replaces_torchvision("models.detection.retinanet.RetinaNet.postprocess_detections")
def retinanet_detections(
    retinanet: Any,
    head_outputs: dict[str, list[Tensor]],
    anchors: list[list[Tensor]],
    image_shapes: list[tuple[int, int]],
) -> list[dict[str, Tensor]]:
    """See :func:`_detections`."""
    return _detections(
        retinanet,
        head_outputs,
        anchors,
        image_shapes,
        ("cls_logits",),
        torch.sigmoid,
        retinanet.box_coder.decode_single,
    )


@replaces_torchvision("models.detection.fcos.FCOS.postprocess_detections")
def fcos_detections(
    fcos: Any, head_outputs: dict[str, list[Tensor]], anchors: list[list[Tensor]], image_shapes: list[tuple[int, int]]
) -> list[dict[str, Tensor]]:
    """See :func:`_detections`; of an anchor "bbox_ctrness", ``[B, A, 1]``, has a part in its scores."""

    def score(logits: Tensor, centerness: Tensor) -> Tensor:
        return torch.sqrt(torch.sigmoid(logits) * torch.sigmoid(centerness))

    rated = "cls_logits", "bbox_ctrness"
    return _detections(fcos, head_outputs, anchors, image_shapes, rated, score, fcos.box_coder.decode)


def _detections(
    detector: Any,
    head_outputs: dict[str, list[Tensor]],
    anchors: list[list[Tensor]],
    image_shapes: list[tuple[int, int]],
    rated: Sequence[str],
    score: Callable[..., Tensor],
    decode: Callable[[Tensor, Tensor], Tensor],
) -> list[dict[str, Tensor]]:
    """The originals compute and look through the scores of all anchors for all classes, of which few are candidates.

    Args:
        head_outputs: of each level "cls_logits", ``[B, A, C]``, "bbox_regression", ``[B, A, 4]``, and more.
        anchors: of each image those of each level, ``[A, 4]``.
        image_shapes: height and width of each image.
        rated: the outputs that scores are computed from, logits first.
        score: computes them, value by value; they grow with the logits.
        decode: boxes from regression and anchors.

    Returns:
        Of each image "boxes", "scores" and "labels".
    """
    from torchvision.ops.boxes import batched_nms, clip_boxes_to_image

    detections = []
    for image, shape in enumerate(image_shapes):
        candidates = []
        for level, anchors_of_level in enumerate(anchors[image]):
            outputs = [head_outputs[name][level][image] for name in rated]
            scores, anchor, labels = _candidates(outputs, score, detector.score_thresh, detector.topk_candidates)
            boxes = decode(head_outputs["bbox_regression"][level][image, anchor], anchors_of_level[anchor])
            candidates.append((clip_boxes_to_image(boxes, shape), scores, labels))
        boxes, scores, labels = (torch.cat(of_levels) for of_levels in zip(*candidates))
        kept = batched_nms(boxes, scores, labels, detector.nms_thresh)[: detector.detections_per_img]
        detections.append({"boxes": boxes[kept], "scores": scores[kept], "labels": labels[kept]})
    return detections


def _candidates(
    outputs: list[Tensor], score: Callable[..., Tensor], threshold: float, most: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The best scores above a threshold, and their anchors and classes.

    An anchor of whose classes the best falls short, by more than rounding may have to do with, is not looked at again.
    """
    logits, *others = outputs  # [A, C], and [A, 1]
    best = score(logits.where(~logits.isnan(), -math.inf).amax(1, keepdim=True), *others)
    rounding = 4 * torch.finfo(best.dtype).eps * abs(threshold)
    (anchor,) = torch.where(best[:, 0] >= threshold - rounding)
    scores = score(*(output[anchor] for output in outputs))
    place, label = torch.where(scores > threshold)
    scores, order = scores[place, label].topk(topk_min(place, most, 0))
    return scores, anchor[place[order]], label[order]


@replaces_torchvision("models.detection.ssd.SSD.postprocess_detections")
def ssd_detections(
    ssd: Any, head_outputs: dict[str, Tensor], image_anchors: list[Tensor], image_shapes: list[tuple[int, int]]
) -> list[dict[str, Tensor]]:
    """The original goes class by class, of which there may be many: a graph that takes minutes to compile.

    Args:
        head_outputs: "cls_logits", ``[B, A, C]``, and "bbox_regression", ``[B, A, 4]``.
        image_anchors: ``[A, 4]`` of each image.
        image_shapes: height and width of each image.

    Returns:
        Of each image "boxes", "scores" and "labels".
    """
    from torchvision.ops.boxes import batched_nms, clip_boxes_to_image

    probabilities = head_outputs["cls_logits"].softmax(dim=-1)
    detections = []
    for codes, scores, anchors, shape in zip(
        head_outputs["bbox_regression"], probabilities, image_anchors, image_shapes
    ):
        boxes = clip_boxes_to_image(ssd.box_coder.decode_single(codes, anchors), shape)
        scores = scores[:, 1:].T  # [C - 1, A], without the background
        candidates = topk_min(scores, ssd.topk_candidates, 1)
        best, anchor = scores.where(scores > ssd.score_thresh, -math.inf).topk(candidates, dim=1)
        label, place = torch.where(best > -math.inf)
        anchor, best = anchor[label, place], best[label, place]
        kept = batched_nms(boxes[anchor], best, label, ssd.nms_thresh)[: ssd.detections_per_img]
        detections.append({"boxes": boxes[anchor[kept]], "scores": best[kept], "labels": label[kept] + 1})
    return detections
