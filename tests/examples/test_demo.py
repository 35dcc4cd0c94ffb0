"""examples/demo.py: each way to run the network takes its path, the results agree, the picture is there."""

import pathlib
import re
import subprocess
import sys

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
image_module = pytest.importorskip("PIL.Image")

DEMO = pathlib.Path(__file__).parents[2] / "examples" / "demo.py"
SIDES = r"eager|torch\.compile|AOTInductor"


@pytest.mark.slow
def test_demo(tmp_path):
    photograph = tmp_path / "photograph.png"
    pixels = torch.randint(0, 256, (96, 128, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    image_module.fromarray(pixels.numpy()).save(photograph)
    command = [sys.executable, DEMO, "--photo", photograph, "--out", tmp_path / "out"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    output = result.stdout

    errors = dict(re.findall(rf"^({SIDES}) +[\d.]+ ms +[\d.]+x +(\S+)$", output, re.MULTILINE))
    assert len(errors) == 3 and all(float(error) < 1e-2 for error in errors.values()), output
    paths = re.findall(rf"^({SIDES}) +(\dx \w+), ", output, re.MULTILINE)
    assert paths == [("eager", "4x eager"), ("torch.compile", "4x template"), ("AOTInductor", "4x template")], output
    with image_module.open(tmp_path / "out" / "demo.png") as picture:
        assert min(picture.size) > 800
    assert (tmp_path / "out" / "demo.pt2").stat().st_size > 0
