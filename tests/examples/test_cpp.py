"""examples/cpp: the C++ program runs a package at any size, and says what is wrong with its arguments."""

import re
import shutil
import subprocess

import pytest
import torch
from inductor_vision import package_target
from inductor_vision.integrations.one_image import one_image
from inductor_vision.perf.suites.detectors import detections_error  # in any order of equal scores
from inductor_vision.tests.support.cpp_program import detections_of, run, run_on
from inductor_vision.tests.support.detectors import assert_same_detections, small_detector
from inductor_vision.tests.support.machine_code import OF_NO_PROCESSOR, only_for_x86_64
from inductor_vision.tests.support.transformers_models import small_model


@pytest.fixture(scope="module")
def program(cpp_program):
    return cpp_program


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


@pytest.mark.slow
def test_detector_of_transformers(program, transformers_package, tmp_path):
    image, detector = torch.rand(3, 160, 192), one_image(small_model("rt_detr_v2"), -2.0)
    with torch.no_grad():
        expected = detector(image)
    outputs, printed = run_on(program, transformers_package, image, tmp_path, threads=2)
    assert "boxes             [12, 4]" in printed
    assert detections_error(detections_of(outputs, list(expected), image.shape[1:]), expected) < 1e-3


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
