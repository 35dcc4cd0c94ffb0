"""examples/detect.py: a picture with the detections of a package drawn on it."""

import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

PROGRAM = pathlib.Path(__file__).parents[2] / "examples" / "detect.py"


def run(*arguments):
    return subprocess.run([sys.executable, PROGRAM, *map(str, arguments)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("picture") / "grey.png"
    Image.fromarray(np.full((120, 160, 3), 128, np.uint8)).save(path)
    return path


@pytest.mark.slow
def test_draws(detector_package, picture, tmp_path):
    drawn = tmp_path / "folder" / "drawn.png"
    result = run(picture, "--package", detector_package, "--out", drawn, "--score", 0, "--most", 3)
    assert result.returncode == 0, result.stderr
    first, *names, last = result.stdout.splitlines()
    assert first.startswith("12 detections in ") and first.endswith("3 of them are drawn")
    assert len(names) == 3 and all(name.split()[0] in ("cat", "dog", "cup") for name in names)
    assert last == f"wrote {drawn}"
    pixels = np.asarray(Image.open(drawn))
    assert pixels.shape == (120, 160, 3)
    assert 0.02 < (pixels != 128).any(axis=2).mean() < 0.98


@pytest.mark.slow
def test_nothing_to_draw(detector_package, picture, tmp_path):
    drawn = tmp_path / "drawn.png"
    result = run(picture, "--package", detector_package, "--out", drawn, "--score", 1.1)
    assert result.returncode == 0, result.stderr
    assert "0 of them are drawn" in result.stdout
    assert (np.asarray(Image.open(drawn)) == 128).all()


def test_no_picture(tmp_path):
    result = run(tmp_path / "nowhere.png")
    assert result.returncode == 1 and "cannot read" in result.stderr
