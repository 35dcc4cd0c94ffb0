"""Vision operators that TorchInductor compiles into fused, vectorized, multi-core C++."""

from .accelerate import accelerate_torchvision as accelerate_torchvision
from .explain import Explanation as Explanation, explain as explain
from .lowering.hook import install_when_inductor_is_imported
from .ops.deform_conv2d import DeformConv2d as DeformConv2d, deform_conv2d as deform_conv2d
from .version import __version__ as __version__

install_when_inductor_is_imported()
