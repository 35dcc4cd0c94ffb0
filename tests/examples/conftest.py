"""examples/export.py, and the package that it makes."""

import importlib.util
import pathlib
import pickle

import pytest
import torch
from inductor_vision.paths import recorded_paths
from inductor_vision.tests.support.shared import made_once

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

    def make(folder):
        with recorded_paths() as paths:
            export_example.export(model, folder / "model.pt2")
        (folder / "paths.pickle").write_bytes(pickle.dumps(list(paths)))

    folder = made_once(tmp_path_factory, "exported", make)
    return model, folder / "model.pt2", pickle.loads((folder / "paths.pickle").read_bytes())
