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


@pytest.mark.slow
def test_demo(tmp_path):
    photograph = tmp_path / "photograph.png"
    pixels = torch.randint(0, 256, (96, 128, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    image_module.fromarray(pixels.numpy()).save(photograph)
    command = [sys.executable, DEMO, "--photo", photograph, "--out", tmp_path / "out"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    output = result.stdout

    rows = dict(re.findall(r"^(eager|torch\.compile|AOTInductor) +[\d.]+ ms +(.*)$", output, re.MULTILINE))
    assert set(rows) == {"eager", "torch.compile", "AOTInductor"}, output
    for name, row in rows.items():
        _, error, path = row.split(maxsplit=2)
        assert float(error) < 1e-2, output
        assert path.startswith("4x eager" if name == "eager" else "4x template"), output
    with image_module.open(tmp_path / "out" / "demo.png") as picture:
        assert min(picture.size) > 800
    assert (tmp_path / "out" / "demo.pt2").stat().st_size > 0
