"""examples/cpp: the C++ program runs a package at any size, and says what is wrong with its arguments."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from inductor_vision import package_target
from inductor_vision.tests.support.detectors import assert_same_detections, small_detector
from inductor_vision.tests.support.machine_code import OF_NO_PROCESSOR, only_for_x86_64

BUILD = pathlib.Path(__file__).parents[2] / "examples" / "cpp" / "build.sh"

pytestmark = pytest.mark.skipif(
    not shutil.which(os.environ.get("CXX", "g++")) or not shutil.which("bash"), reason="needs g++ and bash"
)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("cpp") / "run"
    subprocess.run([BUILD, path], check=True, env={**os.environ, "PYTHON": sys.executable})
    return path


def run(program, *arguments):
    return subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, timeout=60)


def run_on(program, package, image, folder, threads):
    """The program's outputs for an image, by name, and what it printed."""
    image.numpy().tofile(folder / "input")
    shape = "x".join(map(str, image.shape))
    files = ("--input", folder / "input", "--output", folder / "outputs")
    result = run(program, package, "--shape", shape, *files, "--threads", threads, "--runs", 3)
    assert result.returncode == 0, result.stderr
    outputs = sorted((folder / "outputs").iterdir())
    return {file.name: torch.from_numpy(np.fromfile(file, dtype=np.float32)) for file in outputs}, result.stdout


@pytest.mark.parametrize("shape", [(1, 3, 24, 40), (3, 3, 37, 19)])
def test_same_values_as_the_model(program, exported, tmp_path, shape):
    model, package, _ = exported
    image = torch.randn(shape)
    with torch.no_grad():
        expected = model(image)
    actual, printed = run_on(program, package, image, tmp_path, threads=2)
    torch.testing.assert_close(actual["output0"].view(expected.shape), expected, rtol=1e-5, atol=1e-5)
    checksum = float(re.search(rf"output0 +\[{', '.join(map(str, expected.shape))}\], checksum (\S+)", printed)[1])
    assert checksum == pytest.approx(expected.double().sum().item(), rel=1e-4)
    assert float(re.search(r"time +(\S+) ms", printed)[1]) > 0


@pytest.mark.slow
def test_detector(program, detector_package, tmp_path):
    image, detector = torch.rand(3, 100, 150), small_detector("MaskRCNN")
    with torch.no_grad():
        (expected,) = detector([image])
    outputs, printed = run_on(program, detector_package, image, tmp_path, threads=2)
    outputs["labels"] = outputs["labels"].long()
    assert "boxes             [12, 4]" in printed
    assert_same_detections({key: outputs[key].view(value.shape) for key, value in expected.items()}, expected)


def test_any_number_of_threads(program, exported, tmp_path):
    image = torch.randn(2, 3, 45, 50)
    outputs = []
    for threads in (1, 2, 3):
        output, printed = run_on(program, exported[1], image, tmp_path, threads)
        assert re.search(rf"threads +{threads}\n", printed)
        outputs.append(output["output0"])
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


def test_does_not_link_python(program):
    if not shutil.which("ldd"):
        pytest.skip("ldd is not installed")
    libraries = subprocess.run(["ldd", program], check=True, capture_output=True, text=True).stdout
    assert "libtorch_cpu" in libraries
    assert "python" not in re.sub(r"=> \S+", "", libraries)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "which model?"),
        (["nowhere.pt2"], "cannot read nowhere.pt2"),
        (["{package}", "--runs", "two"], "--runs must be an integer of at least 1, got 'two'"),
        (["{package}", "--shape", "1x3x0x8"], "--shape must be an integer of at least 1, got '0'"),
        (["{package}", "--shape"], "--shape wants a value"),
        (["{package}", "--depth", "3"], "no option --depth"),
        (["{package}", "{package}"], "one model is wanted"),
        (["{package}", "--input", "nowhere"], "cannot read nowhere"),
        (["{package}", "--input", "{package}"], "the shape wants 602112"),
    ],
)
def test_bad_usage(program, exported, arguments, message):
    result = run(program, *(argument.format(package=exported[1]) for argument in arguments))
    assert result.returncode == 2
    assert message in result.stderr and "--help" in result.stderr


def test_input_that_the_model_does_not_take(program, exported):
    result = run(program, exported[1], "--shape", "1x4x224x224")
    assert result.returncode == 1
    assert "expected: 3, but got: 4" in result.stderr


@pytest.mark.slow
@only_for_x86_64
def test_package_for_another_processor(program, tmp_path):
    package = tmp_path / "relu.pt2"
    exported = torch.export.export(torch.nn.ReLU(), (torch.rand(5),))
    with package_target():
        torch._inductor.aoti_compile_and_package(
            exported, package_path=str(package), inductor_configs=OF_NO_PROCESSOR.copy()
        )
    result = run(program, package, "--shape", "5")
    assert result.returncode == 1
    assert re.match(
        r"run: the model failed: this package was compiled for bdver4; the processor at hand lacks( \w+)* xop",
        result.stderr,
    )


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("qemu-x86_64"), reason="qemu-user is not installed")
def test_on_other_processors(program, export_example, tmp_path):
    model, package, image = export_example.Model().eval(), tmp_path / "model.pt2", torch.rand(1, 3, 12, 10)
    export_example.export(model, package, target="x86-64-v3")
    for processor in ("Haswell", "Nehalem"):
        emulator = tmp_path / processor
        emulator.write_text(f'#!/bin/sh\nexec qemu-x86_64 -cpu {processor} {program} "$@"\n')
        emulator.chmod(0o755)
    outputs, _ = run_on(tmp_path / "Haswell", package, image, tmp_path, threads=1)
    with torch.no_grad():
        expected = model(image)
    torch.testing.assert_close(outputs["output0"].view(expected.shape), expected, rtol=1e-5, atol=1e-5)
    result = run(tmp_path / "Nehalem", package, "--shape", "1x3x12x10")
    assert result.returncode == 1
    assert "this package was compiled for x86-64-v3; the processor at hand lacks avx avx2 fma" in result.stderr


def test_help(program):
    result = run(program, "--help")
    assert result.returncode == 0 and "--threads" in result.stdout
