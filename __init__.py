"""Vision operators that TorchInductor compiles into fused, vectorized, multi-core C++."""

from .explain import Explanation as Explanation, explain as explain
from .export import export_detector as export_detector
from .integrations.convolutions import (
    fold_norms as fold_norms,
    fuse_depthwise_separable as fuse_depthwise_separable,
    use_direct_convolutions as use_direct_convolutions,
    use_winograd as use_winograd,
)
from .integrations.models import (
    accelerate as accelerate,
    freeze_weights as freeze_weights,
    inference_options as inference_options,
)
from .integrations.onnx import onnx_translation_table as onnx_translation_table
from .integrations.sampling import accelerate_sampling as accelerate_sampling
from .integrations.torchvision import accelerate_torchvision as accelerate_torchvision
from .integrations.transformers import accelerate_transformers as accelerate_transformers
from .lowering.installation.installer import install_when_inductor_is_imported
from .memory import keep_memory as keep_memory
from .ops.box_iou_rotated import box_iou_rotated as box_iou_rotated
from .ops.deform_conv2d import DeformConv2d as DeformConv2d, deform_conv2d as deform_conv2d
from .ops.depthwise_separable_conv2d import (
    DepthwiseSeparableConv2d as DepthwiseSeparableConv2d,
    depthwise_separable_conv2d as depthwise_separable_conv2d,
)
from .ops.multiscale_deformable_attention import (
    MultiScaleDeformableAttention as MultiScaleDeformableAttention,
    multiscale_deformable_attention as multiscale_deformable_attention,
)
from .ops.multiscale_roi_align import (
    MultiScaleRoIAlign as MultiScaleRoIAlign,
    multiscale_roi_align as multiscale_roi_align,
)
from .ops.nms import batched_nms as batched_nms, nms as nms
from .ops.nms_rotated import batched_nms_rotated as batched_nms_rotated, nms_rotated as nms_rotated
from .ops.patch_conv2d import PatchConv2d as PatchConv2d, patch_conv2d as patch_conv2d
from .ops.ps_roi_align import PSRoIAlign as PSRoIAlign, ps_roi_align as ps_roi_align
from .ops.ps_roi_pool import PSRoIPool as PSRoIPool, ps_roi_pool as ps_roi_pool
from .ops.roi_align import RoIAlign as RoIAlign, roi_align as roi_align
from .ops.roi_pool import RoIPool as RoIPool, roi_pool as roi_pool
from .ops.soft_nms import batched_soft_nms as batched_soft_nms, soft_nms as soft_nms
from .ops.winograd_conv2d import winograd_conv2d as winograd_conv2d
from .target import package_target as package_target
from .version import __version__ as __version__

install_when_inductor_is_imported()
