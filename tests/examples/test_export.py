"""examples/export.py: a package for all sizes, which needs neither this library nor torchvision where it runs."""

import subprocess
import sys

import pytest
import torch

RUN_ALONE = """
import sys
sys.modules["inductor_vision"] = sys.modules["torchvision"] = None  # importing them raises
import torch
model = torch._inductor.aoti_load_package(sys.argv[1])
torch.save(model(torch.load(sys.argv[2])), sys.argv[3])
"""


def test_every_convolution_takes_the_template(exported):
    _, _, paths = exported
    assert [(path.op, path.kind) for path in paths] == [("deform_conv2d", "template")]


@pytest.mark.parametrize("shape", [(1, 3, 20, 31), (4, 3, 48, 17)])
def test_runs_without_this_library(exported, tmp_path, shape):
    model, package, _ = exported
    image, result = torch.randn(shape), tmp_path / "result.pt"
    torch.save(image, tmp_path / "image.pt")
    command = [sys.executable, "-c", RUN_ALONE, str(package), str(tmp_path / "image.pt"), str(result)]
    subprocess.run(command, check=True, cwd=tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(torch.load(result), model(image), rtol=1e-5, atol=1e-5)
