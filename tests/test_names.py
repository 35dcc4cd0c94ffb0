"""The project's root is a package itself, and who stands in it imports its modules by their bare names: none of them
may have the name of a package that people have."""

from __future__ import annotations

import importlib.metadata
import pathlib
import re
import sys

import pytest
from inductor_vision.tests.support.compiled import run_python

ROOT = pathlib.Path(__file__).parent.parent

# What people import beside this package, or what that imports, if it is there. `ops` and `perf` are names on PyPI as
# well, of tools for cloud operators and of what is called pyperf now, which models do not import.
WELL_KNOWN = re.findall(
    r"\w+",
    """
accelerate albucore albumentations bitsandbytes cupy cv2 datasets detectron2 diffusers dill effdet einops evaluate
executorch facenet_pytorch fairscale fastai fire flash_attn fsspec functorch fuse fvcore gradio huggingface_hub hydra
ignite imageio imgaug ipykernel jax joblib kornia lightning matplotlib ml_dtypes mmcv mmdet mmengine models monai mypy
networkx ninja numba numpy nvidia omegaconf onnx onnx_ir onnxruntime onnxscript openvino optimum pandas peft PIL
plotly polars psutil pycocotools pydantic pytest pytorch_lightning quanto ray requests rich ruff safetensors scipy
seaborn segment_anything segmentation_models_pytorch setuptools skimage sklearn supervision sympy tensorboard tensorrt
timm tokenizers torch torchao torchaudio torchmetrics torchrl torchvision tqdm transformers triton trl typer
ultralytics utils wandb xformers yaml yolov5
""",
)


def of_the_root() -> set[str]:
    """What is found before everything else. Folders that are no packages, such as docs, come after everything else."""
    modules = {path.stem for path in ROOT.glob("*.py")} - {"__init__"}
    return modules | {path.parent.name for path in ROOT.glob("*/__init__.py")}


def test_no_module_has_the_name_of_a_package():
    names = of_the_root()
    assert {"ops", "lowering", "export"} <= names
    installed = importlib.metadata.packages_distributions()
    assert "torch" in installed
    assert not names & {*WELL_KNOWN, *installed, *sys.stdlib_module_names}


IMPORT_IN_THE_ROOT = """
import importlib.util, os, pathlib, sys

root = pathlib.Path(sys.argv[1])
os.chdir(root)
assert sys.path[0] == "", sys.path
for name in sys.argv[2:]:
    spec = importlib.util.find_spec(name)
    origins = [] if spec is None else [spec.origin, *(spec.submodule_search_locations or [])]
    for origin in origins:
        assert origin is None or pathlib.Path(origin).parent != root, f"{name} is {origin}"
try:
    import accelerate
except ModuleNotFoundError as error:
    assert error.name == "accelerate", error
"""


def test_packages_are_imported_in_the_root_as_elsewhere():
    run_python(IMPORT_IN_THE_ROOT, str(ROOT), *WELL_KNOWN)


def test_what_would_be_found_instead(tmp_path):
    """The program of the test above fails where there is such a module."""
    (tmp_path / "accelerate.py").touch()
    with pytest.raises(AssertionError, match="accelerate is"):
        run_python(IMPORT_IN_THE_ROOT, str(tmp_path), *WELL_KNOWN)
