"""Small models of transformers: of each kind that has multi-scale deformable attention, with random weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

SIZE = (64, 96)  # height and width of images


def _resnet() -> Any:
    from transformers import ResNetConfig

    return ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 16, 16],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )


def _swin(*stages: int) -> Any:
    from transformers import SwinConfig

    return SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 2, 2, 2],
        window_size=4,
        drop_path_rate=0.0,
        out_features=[f"stage{stage}" for stage in stages],
    )


_SMALL = {"d_model": 32, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "decoder_layers": 2, "num_queries": 12}


def _deformable_detr() -> nn.Module:
    from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection

    config = DeformableDetrConfig(
        **_SMALL,
        backbone_config=_resnet(),
        encoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        num_labels=5,
    )
    return DeformableDetrForObjectDetection(config)


_SMALL_RT = {
    **_SMALL,
    "encoder_hidden_dim": 32,
    "encoder_in_channels": [16, 16, 16],
    "decoder_in_channels": [32, 32, 32],
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "num_labels": 5,
    "num_denoising": 0,
}


def _rt_detr_resnet() -> Any:
    from transformers import RTDetrResNetConfig

    return RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 16, 16],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )


def _rt_detr() -> nn.Module:
    from transformers import RTDetrConfig, RTDetrForObjectDetection

    return RTDetrForObjectDetection(RTDetrConfig(**_SMALL_RT, backbone_config=_rt_detr_resnet()))


def _rt_detr_v2(method: str = "default") -> nn.Module:
    from transformers import RTDetrV2Config, RTDetrV2ForObjectDetection

    return RTDetrV2ForObjectDetection(
        RTDetrV2Config(**_SMALL_RT, backbone_config=_rt_detr_resnet(), decoder_method=method)
    )


def _hgnet() -> Any:
    from transformers import HGNetV2Config

    return HGNetV2Config(
        stem_channels=[3, 8, 8],
        stage_in_channels=[8, 16, 16, 16],
        stage_mid_channels=[8, 8, 8, 8],
        stage_out_channels=[16, 16, 16, 16],
        stage_num_blocks=[1, 1, 1, 1],
        stage_numb_of_layers=[1, 1, 1, 1],
        hidden_sizes=[16, 16, 16, 16],
        depths=[1, 1, 1, 1],
        out_features=["stage2", "stage3", "stage4"],
    )


def _d_fine() -> nn.Module:
    from transformers import DFineConfig, DFineForObjectDetection

    config = DFineConfig(**_SMALL_RT, backbone_config=_hgnet(), decoder_n_points=[3, 6, 3], depth_mult=0.3)
    return DFineForObjectDetection(config)


def _rf_detr() -> nn.Module:
    from transformers import RfDetrConfig, RfDetrDinov2Config, RfDetrForObjectDetection

    backbone = RfDetrDinov2Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=64,
        patch_size=16,
        num_windows=2,
        out_features=["stage1", "stage2"],
    )
    config = RfDetrConfig(
        backbone_config=backbone,
        d_model=32,
        decoder_layers=2,
        decoder_self_attention_heads=2,
        decoder_cross_attention_heads=4,
        decoder_ffn_dim=32,
        num_queries=12,
        group_detr=2,
        c2f_num_blocks=1,
        num_labels=5,
    )
    return RfDetrForObjectDetection(config)


def _grounding_dino() -> nn.Module:
    from transformers import BertConfig, GroundingDinoConfig, GroundingDinoForObjectDetection

    text = BertConfig(vocab_size=1100, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    config = GroundingDinoConfig(
        **_SMALL,
        backbone_config=_swin(2, 3, 4),
        text_config=text,
        encoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        max_text_len=16,
    )
    return GroundingDinoForObjectDetection(config)


_SMALL_MASKS = {
    "hidden_dim": 32,
    "encoder_feedforward_dim": 32,
    "dim_feedforward": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "num_attention_heads": 2,
    "num_queries": 10,
    "num_labels": 5,
}


def _mask2former() -> nn.Module:
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation

    config = Mask2FormerConfig(**_SMALL_MASKS, backbone_config=_swin(1, 2, 3, 4), feature_size=32, mask_feature_size=32)
    return Mask2FormerForUniversalSegmentation(config)


def _oneformer() -> nn.Module:
    from transformers import OneFormerConfig, OneFormerForUniversalSegmentation

    config = OneFormerConfig(
        **_SMALL_MASKS,
        backbone_config=_swin(1, 2, 3, 4),
        text_encoder_width=16,
        text_encoder_num_layers=1,
        text_encoder_vocab_size=100,
        conv_dim=32,
        mask_dim=32,
    )
    return OneFormerForUniversalSegmentation(config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "deformable_detr": _deformable_detr,
    "rt_detr": _rt_detr,
    "rt_detr_v2": _rt_detr_v2,
    "d_fine": _d_fine,
    "rf_detr": _rf_detr,
    "grounding_dino": _grounding_dino,
    "mask2former": _mask2former,
    "oneformer": _oneformer,
}


def small_model(kind: str) -> nn.Module:
    """One of ``MODELS``, in eval mode; its weights are random, the same at every call."""
    torch.manual_seed(0)
    return MODELS[kind]().eval()


def inputs_of(kind: str, size: tuple[int, int] = SIZE) -> dict[str, Tensor]:
    """What a model of this kind is called with, for one image."""
    inputs = {"pixel_values": torch.rand(1, 3, *size)}
    if kind == "grounding_dino":  # [CLS] "cat" "." "dog" "." [SEP], in the numbers of its tokenizer
        inputs["input_ids"] = torch.tensor([[101, 1037, 1012, 1038, 1012, 102]])
    if kind == "oneformer":
        inputs["task_inputs"] = torch.randint(0, 100, (1, 77))
    return inputs


def assert_same_results(ours: Mapping[str, Tensor], stock: Mapping[str, Tensor]) -> None:
    """What models return for their task, to within 1e-4."""
    names = ("logits", "pred_boxes", "class_queries_logits", "masks_queries_logits")
    present = [name for name in names if name in stock]
    assert len(present) == 2
    for name in present:
        torch.testing.assert_close(ours[name], stock[name], rtol=1e-4, atol=1e-4)
