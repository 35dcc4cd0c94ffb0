"""What calls of operators under torch.func compile to: the same kernels, one call for a whole batch of them."""

from __future__ import annotations

import torch
from inductor_vision import deform_conv2d, roi_align
from inductor_vision.tests.support.compare import assert_close
from inductor_vision.tests.support.compiled import compile_and_run
from torch import Tensor


def test_a_batch_of_calls_takes_one_template():
    maps, offsets = torch.randn(3, 2, 4, 8, 9), torch.randn(3, 2, 18, 8, 9)
    weight, rois = torch.randn(6, 4, 3, 3), torch.tensor([[0.0, 1, 1, 6, 7], [1, 0, 2, 5, 5]])

    def loss(map: Tensor, offset: Tensor, weight: Tensor, rois: Tensor) -> Tensor:
        return roi_align(deform_conv2d(map, offset, weight, padding=1), rois, 2, 1.0, 2).square().sum()

    def gradients(maps: Tensor, offsets: Tensor, weight: Tensor, rois: Tensor) -> tuple[Tensor, Tensor]:
        return torch.vmap(torch.func.grad(loss, (0, 1)), (0, 0, None, None))(maps, offsets, weight, rois)

    arguments = maps, offsets, weight, rois
    compiled = compile_and_run(gradients, *arguments, config={"cpp_wrapper": True})
    ops = ("deform_conv2d", "roi_align", "roi_align_backward", "deform_conv2d_backward")
    assert [(path.op, path.kind) for path in compiled.paths] == [(op, "template") for op in ops]
    for result, expected in zip(compiled.result, gradients(*arguments), strict=True):
        assert_close(result, expected, torch.float32)
