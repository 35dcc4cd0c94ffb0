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
    """The program's output for an image, and what it printed."""
    image.numpy().tofile(folder / "input")
    sizes = zip(("--batch", "--channels", "--height", "--width"), image.shape)
    options = [word for option in sizes for word in option]
    files = ("--input", folder / "input", "--output", folder / "output")
    result = run(program, package, *options, *files, "--threads", threads, "--runs", 3)
    assert result.returncode == 0, result.stderr
    return torch.from_numpy(np.fromfile(folder / "output", dtype=np.float32)), result.stdout


@pytest.mark.parametrize("shape", [(1, 3, 24, 40), (3, 3, 37, 19)])
def test_same_values_as_the_model(program, exported, tmp_path, shape):
    model, package, _ = exported
    image = torch.randn(shape)
    with torch.no_grad():
        expected = model(image)
    actual, printed = run_on(program, package, image, tmp_path, threads=2)
    torch.testing.assert_close(actual.view(expected.shape), expected, rtol=1e-5, atol=1e-5)
    assert f"[{', '.join(map(str, expected.shape))}]" in printed
    checksum = float(re.search(r"checksum +(\S+)", printed)[1])
    assert checksum == pytest.approx(expected.double().sum().item(), rel=1e-4)
    assert float(re.search(r"time +(\S+) ms", printed)[1]) > 0


def test_any_number_of_threads(program, exported, tmp_path):
    image = torch.randn(2, 3, 45, 50)
    outputs = []
    for threads in (1, 2, 3):
        output, printed = run_on(program, exported[1], image, tmp_path, threads)
        assert re.search(rf"threads +{threads}\n", printed)
        outputs.append(output)
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
        (["{package}", "--batch", "two"], "--batch must be an integer of at least 1, got 'two'"),
        (["{package}", "--height", "0"], "--height must be an integer of at least 1, got '0'"),
        (["{package}", "--width"], "--width wants a value"),
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
    result = run(program, exported[1], "--channels", 4)
    assert result.returncode == 1
    assert "expected: 3, but got: 4" in result.stderr


def test_help(program):
    result = run(program, "--help")
    assert result.returncode == 0 and "--threads" in result.stdout
