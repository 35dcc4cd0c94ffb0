"""transformers' models with multi-scale deformable attention, from the image to its detections.

The reference is the stock model in eager mode, in float32. The limit is its convolutions and matrix products alone, one
after the other. Transformers is accelerated, or not, for all of a process: so each contender has its own process.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...integrations.one_image import OneImageOfTransformers
from ..backends import needs
from ..models import REMARK, OnnxModel, contender, exported, runtimes
from ..one_image import case, compiled, eager, multiplications, packaged, reference, stock_compiled
from ..spec import Job, Prepared, Suite
from .detectors import detections_error, threshold_in_a_gap

_STOCK_KERNEL = r"aten::(grid_sampler_2d)"
_CLASSES = r"class_embed(\.\d+)?|enc_score_head|enc_out_class_embed\.\d+|class_predictor"  # layers that give logits
_MEAN, _DEVIATION = -4.0, 1.0  # of logits


@dataclasses.dataclass(frozen=True)
class Problem:
    """A model and an image.

    Attributes:
        make: the model, with random weights.
        size: height and width of the image.
        inputs: what else the model is called with.
        detections: how many there are, at least and at most.
    """

    make: Callable[[], nn.Module]
    size: tuple[int, int]
    inputs: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    detections: tuple[int, int] = (40, 60)

    @functools.cached_property
    def image(self) -> Tensor:
        """Smooth, with some noise."""
        generator = torch.Generator().manual_seed(0)
        coarse = torch.randn(1, 3, *(-(-side // 32) for side in self.size), generator=generator)
        smooth = F.interpolate(coarse, size=self.size, mode="bicubic")[0]
        return smooth + 0.2 * torch.randn(3, *self.size, generator=generator)

    @functools.cached_property
    def detector(self) -> OneImageOfTransformers:
        """Takes an image; detects something."""
        torch.manual_seed(0)
        detector = OneImageOfTransformers(self.make().eval(), -1.0, self.inputs)
        handles = [
            layer.register_forward_hook(functools.partial(_scale, scaled=set()))
            for name, layer in detector.named_modules()
            if isinstance(layer, nn.Linear) and re.search(rf"(^|\.)({_CLASSES})$", name)
        ]
        with torch.no_grad():
            scores = detector(self.image)["scores"]
            for handle in handles:
                handle.remove()
        detector.threshold = threshold_in_a_gap(scores, *self.detections)
        return detector


def _scale(layer: Any, inputs: tuple[Tensor], output: Tensor, scaled: set[nn.Module]) -> Tensor | None:
    """Have a layer, of which random weights make logits that are much the same everywhere, give others from its first
    call on."""
    if layer in scaled:
        return None
    scaled.add(layer)
    mean = output.flatten(0, -2).mean(0)
    factor = _DEVIATION / (output - mean).std()
    layer.weight.mul_(factor)
    layer.bias.sub_(mean).mul_(factor).add_(_MEAN)
    return layer.forward(*inputs)


def _deformable_detr() -> nn.Module:
    from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, ResNetConfig

    backbone = ResNetConfig(out_features=["stage2", "stage3", "stage4"])  # ResNet-50
    return DeformableDetrForObjectDetection(DeformableDetrConfig(backbone_config=backbone))


def _rt_detr() -> nn.Module:
    from transformers import RTDetrConfig, RTDetrForObjectDetection

    return RTDetrForObjectDetection(RTDetrConfig())


def _rt_detr_v2() -> nn.Module:
    from transformers import RTDetrResNetConfig, RTDetrV2Config, RTDetrV2ForObjectDetection

    backbone = RTDetrResNetConfig(
        hidden_sizes=[64, 128, 256, 512],
        depths=[2, 2, 2, 2],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = RTDetrV2Config(
        backbone_config=backbone, encoder_in_channels=[128, 256, 512], hidden_expansion=0.5, decoder_layers=3
    )
    return RTDetrV2ForObjectDetection(config)


def _d_fine() -> nn.Module:
    from transformers import DFineConfig, DFineForObjectDetection

    return DFineForObjectDetection(DFineConfig(decoder_n_points=[3, 6, 3]))


def _rf_detr() -> nn.Module:
    from transformers import RfDetrConfig, RfDetrForObjectDetection

    return RfDetrForObjectDetection(RfDetrConfig())


def _swin(*stages: int) -> Any:
    from transformers import SwinConfig

    return SwinConfig(drop_path_rate=0.0, window_size=7, out_features=[f"stage{stage}" for stage in stages])


def _grounding_dino() -> nn.Module:
    from transformers import GroundingDinoConfig, GroundingDinoForObjectDetection

    model = GroundingDinoForObjectDetection(GroundingDinoConfig(backbone_config=_swin(2, 3, 4)))
    for parameter in model.model.text_projection.parameters():  # so that the logits, products with it, are small
        parameter.data.mul_(1 / 16)
    return model


def _mask2former() -> nn.Module:
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation

    return Mask2FormerForUniversalSegmentation(Mask2FormerConfig(backbone_config=_swin(1, 2, 3, 4)))


def _oneformer() -> nn.Module:
    from transformers import OneFormerConfig, OneFormerForUniversalSegmentation

    return OneFormerForUniversalSegmentation(OneFormerConfig(backbone_config=_swin(1, 2, 3, 4)))


def _packaged(job: Job) -> Prepared:
    problem = job.inputs
    return packaged(problem.detector.model, problem.image, threshold=problem.detector.threshold, inputs=problem.inputs)


def _exported(job: Job) -> OnnxModel:
    problem = job.inputs
    return exported(job.case.name, problem.detector, problem.image, list(reference(problem)))


_PROMPT = {"input_ids": torch.tensor([[101, 4937, 1012, 3899, 1012, 102]])}  # "cat. dog."

_TASK = {"task_inputs": torch.arange(77)[None]}  # stands for tokens of "the task is instance"

_contender = functools.partial(contender, library=needs("transformers.modeling_utils"))

SUITE = Suite(
    name="transformers",
    description="transformers' models with multi-scale deformable attention and random weights, from the image to its "
    "detections",
    remark=REMARK,
    reference=reference,
    error=detections_error,
    contenders=(
        _contender("ours-frozen", "ours", compiled, compiled=True),
        _contender("ours-compiled", "ours", functools.partial(compiled, freezing=False), compiled=True),
        _contender("ours-aoti", "ours", _packaged, compiled=True),
        _contender("stock", "peer", eager),
        _contender("stock-compiled", "peer", functools.partial(stock_compiled, pattern=_STOCK_KERNEL), compiled=True),
        *runtimes(_exported, library=needs("transformers.modeling_utils")),
        _contender("multiplications", "limit", multiplications),
    ),
    cases=(
        case("deformable_detr_r50", Problem(_deformable_detr, (800, 1066))),
        case("grounding_dino_tiny", Problem(_grounding_dino, (800, 1066), _PROMPT)),
        case("mask2former_swin_tiny", Problem(_mask2former, (512, 512))),
        case("oneformer_swin_tiny", Problem(_oneformer, (512, 512), _TASK)),
        case("rt_detr_r50", Problem(_rt_detr, (640, 640))),
        case("rt_detr_v2_r18", Problem(_rt_detr_v2, (640, 640))),
        case("d_fine_l", Problem(_d_fine, (640, 640))),
        case("rf_detr_base", Problem(_rf_detr, (560, 560))),
    ),
)
