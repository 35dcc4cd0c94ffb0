"""examples/detect.py: a picture with the detections of a package drawn on it."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from inductor_vision.tests.support.detectors import small_detector
from inductor_vision.tests.support.transformers_models import small_model
from PIL import Image

PROGRAM = pathlib.Path(__file__).parents[2] / "examples" / "detect.py"


def run(*arguments):
    return subprocess.run([sys.executable, PROGRAM, *map(str, arguments)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("picture") / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (120, 160, 3), np.uint8)).save(path)
    return path


@pytest.mark.slow
def test_draws(detector_package, picture, tmp_path):
    drawn = tmp_path / "folder" / "drawn.png"
    result = run(picture, "--package", detector_package, "--out", drawn, "--score", 0, "--most", 3)
    assert result.returncode == 0, result.stderr
    first, *names, last = result.stdout.splitlines()
    assert first.startswith("12 detections in ") and first.endswith("3 of them are drawn")
    image = torch.from_numpy(np.array(Image.open(picture))).permute(2, 0, 1) / 255
    with torch.no_grad():
        (stock,) = small_detector("MaskRCNN")([image])
    labels = ["background", "cat", "dog", "cup"]
    for line, label, score, box in zip(names, stock["labels"], stock["scores"], stock["boxes"].tolist(), strict=False):
        name, its_score, *corners = line.split()
        assert name == labels[label] and float(its_score) == pytest.approx(score.item(), abs=0.01)
        assert [float(corner) for corner in corners] == pytest.approx(box, abs=0.1)
    assert len(names) == 3 and last == f"wrote {drawn}"
    changed = (np.asarray(Image.open(drawn)) != np.asarray(Image.open(picture))).any(axis=2)
    assert changed.shape == (120, 160) and 0.02 < changed.mean() < 0.98


@pytest.mark.slow
def test_prepares_a_picture_for_a_model_of_transformers(transformers, transformers_package, picture, tmp_path):
    """As its image processor does, whose boxes are in pixels of the picture."""
    package = tmp_path / "detector.pt2"
    package.symlink_to(transformers_package)
    size, mean, std = {"height": 160, "width": 192}, [0.4, 0.5, 0.6], [0.3, 0.2, 0.4]
    package.with_name("detector.pt2.json").write_text(json.dumps({"size": size, "mean": mean, "std": std}))
    result = run(picture, "--package", package, "--out", tmp_path / "drawn.png", "--score", 0, "--most", 4)
    assert result.returncode == 0, result.stderr
    _, *lines, _ = result.stdout.splitlines()

    processor = transformers.RTDetrImageProcessor(size=size, do_normalize=True, image_mean=mean, image_std=std)
    model, image = small_model("rt_detr_v2"), Image.open(picture)
    with torch.no_grad():
        outputs = model(**processor(image, return_tensors="pt"))
    (found,) = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=[image.size[::-1]])
    assert len(lines) == 4
    for line, label, score, box in zip(lines, *(found[name] for name in ("labels", "scores", "boxes")), strict=False):
        name, its_score, *corners = line.split()
        assert name == ["cat", "dog", "cup", "car", "bus"][label] and float(its_score) == pytest.approx(
            score.item(), abs=0.01
        )
        assert [float(corner) for corner in corners] == pytest.approx(box.tolist(), abs=0.2)


@pytest.mark.slow
def test_nothing_to_draw(detector_package, picture, tmp_path):
    drawn = tmp_path / "drawn.png"
    result = run(picture, "--package", detector_package, "--out", drawn, "--score", 1.1)
    assert result.returncode == 0, result.stderr
    assert "0 of them are drawn" in result.stdout
    assert (np.asarray(Image.open(drawn)) == np.asarray(Image.open(picture))).all()


def test_no_picture(tmp_path):
    result = run(tmp_path / "nowhere.png")
    assert result.returncode == 1 and "cannot read" in result.stderr
