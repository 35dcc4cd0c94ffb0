"""Overlaps of boxes that are rotated about their centres, all of one list with all of another."""

from __future__ import annotations

import torch
from torch import Tensor

from .boxes import check_boxes
from .registry import check, define_op, is_proxy, not_scriptable, record_call, register_no_gradient, serves_torchvision

COLUMNS = "x, y, width, height, angle"


@not_scriptable
def box_iou_rotated(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    r"""Intersection over union of rotated boxes; a drop-in for :func:`torchvision.ops.box_iou` with ``fmt="cxcywhr"``.

    .. math:: \text{out}[i, j] = \frac{|a_i \cap b_j|}{|a_i| + |b_j| - |a_i \cap b_j|}

    A box is a rectangle with its centre at (x, y), rotated by an angle in degrees, counter-clockwise as seen in an
    image, where y points down: its width lies along (cos, -sin), its height along (sin, cos). That is the convention of
    torchvision's ``cxcywhr`` and of detectron2.

    Overlaps are computed in float64, relative to the centres, whatever the dtype. A box overlaps none, not even itself,
    if its width times height is not positive, or if a number is NaN, infinite, or so large that its area or corners
    overflow. (torchvision also returns 0 for areas below 1e-14.) Two negative sides count as positive ones. The result
    has no gradient.

    Args:
        boxes1: ``[N, 5]``, rows of (x, y, width, height, angle), float32, float64, bfloat16 or float16.
        boxes2: ``[M, 5]``, of the same dtype.

    Returns:
        ``[N, M]``, in the dtype of the boxes; torchvision computes and returns float32 for float64 boxes too.

    Raises:
        RuntimeError: shapes, dtypes or devices are not compatible.
    """
    if is_proxy(boxes1, boxes2):
        return record_call(box_iou_rotated, **locals())
    return _op(boxes1, boxes2)


def _check(boxes1: Tensor, boxes2: Tensor) -> None:
    check_boxes("box_iou_rotated", "boxes1", boxes1, COLUMNS)
    check_boxes("box_iou_rotated", "boxes2", boxes2, COLUMNS)
    same = boxes1.dtype == boxes2.dtype
    check("box_iou_rotated", same, f"boxes2 must be {boxes1.dtype}, as boxes1 is; got {boxes2.dtype}")
    there = boxes1.device == boxes2.device
    check("box_iou_rotated", there, f"boxes2 must be on {boxes1.device}, got {boxes2.device}")


def _fake(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    _check(boxes1, boxes2)
    return boxes1.new_empty(boxes1.shape[0], boxes2.shape[0])


def _decomposition(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    _check(boxes1, boxes2)
    return iou_rotated(boxes1[:, None], boxes2).to(boxes1.dtype)  # [N, M]


def iou_rotated(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """The overlap of boxes, ``[..., 5]``, with others, in float64."""
    return overlap(rectangles(boxes1), rectangles(boxes2))


def overlap(rectangles1: Tensor, rectangles2: Tensor) -> Tensor:
    """The overlap of :func:`rectangles`, ``[..., 8]``, with others.

    In the frame of the first box, of half sides w and h, the intersection is an integral along the second box's edges:
    the integral of clamp(y, -h, h) dx, where x is clamped to [-w, w].
    """
    x1, y1, w1, h1, cos1, sin1, area1, proper1 = rectangles1.unbind(-1)
    x2, y2, w2, h2, cos2, sin2, area2, proper2 = rectangles2.unbind(-1)
    dx, dy = x2 - x1, y2 - y1
    px, py = dx * cos1 - dy * sin1, dx * sin1 + dy * cos1
    cos, sin = cos2 * cos1 + sin2 * sin1, sin2 * cos1 - cos2 * sin1
    ux, uy, vx, vy = w2 * cos, -w2 * sin, h2 * sin, h2 * cos  # half of the sides

    def below(x: Tensor, y: Tensor, end: Tensor, slope: Tensor) -> Tensor:
        """The integral along a line that begins at (x, y)."""
        from_x, to_x = x.clamp(-w1, w1), end.clamp(-w1, w1)
        a, b = y + (from_x - x) * slope, y + (to_x - x) * slope
        inside_a, inside_b = a.clamp(-h1, h1), b.clamp(-h1, h1)
        above, under = b.maximum(h1) - a.maximum(h1), b.minimum(-h1) - a.minimum(-h1)
        total = (inside_b - inside_a) * (inside_b + inside_a) / 2 + h1 * (above - under)
        return (to_x - from_x) * torch.where(a == b, inside_a, total / (b - a))

    u_slope, v_slope = (uy / ux).clamp(-1e200, 1e200), (vy / vx).clamp(-1e200, 1e200)  # what is upright has no integral
    first_x, first_y, opposite_x, opposite_y = px - ux - vx, py - uy - vy, px + ux + vx, py + uy + vy
    second_x, fourth_x = px + ux - vx, px - ux + vx
    along_u = below(first_x, first_y, second_x, u_slope) + below(opposite_x, opposite_y, fourth_x, u_slope)
    along_v = below(opposite_x, opposite_y, second_x, v_slope) + below(first_x, first_y, fourth_x, v_slope)
    intersection = (along_u - along_v).abs().minimum(area1).minimum(area2)

    # What is left of an integral that should be 0 is not: boxes are apart if they are along an axis or any side.
    qx, qy = dx * cos2 - dy * sin2, dx * sin2 + dy * cos2
    extent1, extent2 = _extents(w1, h1, cos1, sin1), _extents(w2, h2, cos2, sin2)
    meet = (dx.abs() < extent1[0] + extent2[0]) & (dy.abs() < extent1[1] + extent2[1])
    meet = meet & (px.abs() < w1 + ux.abs() + vx.abs()) & (py.abs() < h1 + uy.abs() + vy.abs())
    meet = meet & (qx.abs() < w2 + w1 * cos.abs() + h1 * sin.abs()) & (qy.abs() < h2 + w1 * sin.abs() + h1 * cos.abs())
    ratio = intersection / (area1 + area2 - intersection)
    return ratio.where((proper1 != 0) & (proper2 != 0) & meet & (ratio > 0), 0)


def rectangles(boxes: Tensor) -> Tensor:
    """Centre, half sides, cosine, sine, area of boxes ``[..., 5]``, and whether they can overlap any; ``[..., 8]``."""
    x, y, width, height, degrees = boxes.double().unbind(-1)
    half_width, half_height, area = width.abs() / 2, height.abs() / 2, width * height
    turn = degrees.fmod(360)
    quarters = (turn / 90).round()
    rest = torch.deg2rad(turn - 90 * quarters)
    quarters = quarters.remainder(4)
    cos, sin = rest.cos(), rest.sin()  # exactly 0 and 1 for right angles
    turned = quarters.remainder(2) == 1
    sign = torch.where(quarters >= 2, -1.0, 1.0)
    cos, sin = torch.where(turned, -sin, cos) * sign, torch.where(turned, cos, sin) * sign
    extent_x, extent_y = _extents(half_width, half_height, cos, sin)
    proper = (area > 0) & (x + y).isfinite() & (area + extent_x + extent_y).isfinite()
    return torch.stack([x, y, half_width, half_height, cos, sin, area, proper.double()], dim=-1)


def _extents(half_width: Tensor, half_height: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return half_width * cos.abs() + half_height * sin.abs(), half_width * sin.abs() + half_height * cos.abs()


_op = define_op(
    "box_iou_rotated(Tensor boxes1, Tensor boxes2) -> Tensor",
    decomposition=_decomposition,
    fake=_fake,
    autocast=False,  # it computes in float64
)
register_no_gradient(_op)


@serves_torchvision("box_iou_rotated")
def _torchvision(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    return box_iou_rotated(boxes1, boxes2).float()  # of whichever boxes
