"""examples/export.py, and the package that it makes."""

import importlib.util
import pathlib

import pytest
import torch
from inductor_vision.paths import recorded_paths

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="session")
def export_example():
    """The module examples/export.py."""
    spec = importlib.util.spec_from_file_location("export_example", EXAMPLES / "export.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def exported(export_example, tmp_path_factory):
    """A model, the path of its package, and the paths that its operator calls took."""
    torch.manual_seed(0)
    model = export_example.Model(channels=3, out_channels=5).eval()
    path = tmp_path_factory.mktemp("package") / "model.pt2"
    with recorded_paths() as paths:
        export_example.export(model, path)
    return model, path, list(paths)
