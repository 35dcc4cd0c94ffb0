"""Vision operators that TorchInductor compiles into fused, vectorized, multi-core C++."""

from .accelerate import accelerate_torchvision
from .explain import explain
from .lowering.hook import install_when_inductor_is_imported
from .ops.deform_conv2d import DeformConv2d, deform_conv2d
from .version import __version__

install_when_inductor_is_imported()

__all__ = [
    "DeformConv2d",
    "__version__",
    "accelerate_torchvision",
    "deform_conv2d",
    "explain",
]
