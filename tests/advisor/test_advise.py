"""``python -m inductor_vision.advisor``: what a user sees, and that what is measured is what is recommended."""

import dataclasses
import gc
import io
import json
import math
import os
import pathlib
import subprocess
import sys
import time

import pytest
import torch
from inductor_vision.advisor import __main__ as cli, advise, picture, summary, variants
from inductor_vision.advisor.choices import REPLACEMENTS
from inductor_vision.advisor.measure import Comparison, Measured, Way, compare
from inductor_vision.advisor.recommend import LayerResult
from inductor_vision.advisor.statistic import Ratio
from inductor_vision.advisor.target import Input, Program, Target
from inductor_vision.advisor.variants import Variant
from inductor_vision.perf import interleaving, machine
from inductor_vision.perf.progress import Progress
from inductor_vision.perf.results import Spread
from inductor_vision.perf.spec import Prepared, UserError
from inductor_vision.tests.support.machine import MACHINE
from torch import nn

MODELS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.pointwise = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        x = self.grouped(self.grouped(self.stem(x).relu()))
        return {"maps": [self.pointwise(self.depthwise(x))], "none": None}

def make():
    return Net()

class Noisy(nn.Module):
    def forward(self, x):
        return x + torch.randn(())

class Broken(nn.Module):
    def forward(self, x):
        return x / 0

class Silent(nn.Module):
    def forward(self, x):
        return "nothing"

def compiled():
    return torch.compile(Net())

def failing():
    return 1 / 0

def needs_argument(size):
    return Net()

def makes_dict():
    return {}

instance = Net()
number = 3
"""


@pytest.fixture
def models(tmp_path):
    path = tmp_path / "models.py"
    path.write_text(MODELS)
    return path


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(gc, "collect", lambda: 0)  # takes a third of a second beside a loaded torch
    monkeypatch.setattr(interleaving, "wait_until_idle", lambda: None)
    monkeypatch.setattr(interleaving, "_CALIBRATION_SECONDS", 0.001)


def program_of(models, factory="make"):
    return Target(f"{models}:{factory}", (Input((2, 3, 6, 8)),)).load()


@pytest.mark.parametrize(
    ("text", "shape", "dtype"),
    [
        ("1x3x224x224", (1, 3, 224, 224), torch.float32),
        ("4x77:int64", (4, 77), torch.int64),
        ("7:bf16", (7,), torch.bfloat16),
        ("2x2:uint8", (2, 2), torch.uint8),
        ("2x2:bool", (2, 2), torch.bool),
    ],
)
def test_inputs(text, shape, dtype):
    input = Input.parse(text)
    tensor = input.make(torch.Generator().manual_seed(0))
    assert (tuple(tensor.shape), tensor.dtype) == (shape, dtype)
    if dtype == torch.int64:
        assert set(tensor.unique().tolist()) == {0, 1}


@pytest.mark.parametrize("text", ["", "1x", "1x-3", "0x3", "axb", "1,3,8", "1x3:float31", "1x3:"])
def test_malformed_inputs(text):
    with pytest.raises(UserError, match="expected sizes like 1x3x224x224" if ":" not in text else "no dtype '"):
        Input.parse(text)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("{file}:make:input", "there is no file"),
        ("{file}", "is not MODULE:FACTORY"),
        ("no_such_package.models:make", "there is no module 'no_such_package'"),
        ("{folder}/absent.py:make", "there is no file"),
        ("{folder}/needs.py:make", "cannot be imported: ModuleNotFoundError: No module named 'no_such_dependency'"),
        ("{folder}/raises.py:make", "cannot be imported: RuntimeError: two lines (raises.py, line 2)"),
        ("{folder}/exits.py:make", "cannot be imported: SystemExit: 3"),
        ("{folder}/syntax.py:make", "cannot be imported: SyntaxError"),
        ("{file}:absent", "has no 'absent'"),
        ("{file}:number", "is of type int: neither an nn.Module nor a function that makes one"),
        ("{file}:failing", "failing() failed: ZeroDivisionError: division by zero (models.py, line"),
        ("{file}:needs_argument", "needs_argument() failed: TypeError: needs_argument() missing 1 required"),
        ("{file}:makes_dict", "makes_dict() returned an object of type dict, not an nn.Module"),
        ("{file}:compiled", "is compiled already"),
        ("{file}:Noisy", "the model returns something else at each call"),
        ("{file}:Broken", "the model's result is not finite"),
        ("{file}:Silent", "the model returns no tensor"),
    ],
)
def test_what_is_wrong_with_a_model(models, capsys, model, message):
    for name, source in {
        "needs": "import no_such_dependency",
        "raises": "\nraise RuntimeError('two\\nlines')",
        "exits": "import sys; sys.exit(3)",
        "syntax": "def",
    }.items():
        models.with_name(f"{name}.py").write_text(source)
    status = cli.main([model.format(file=models, folder=models.parent), "--input", "1x3x8x8"])
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if not line.startswith("[")]
    assert (status, out, len(errors)) == (2, "", 1)
    assert message in errors[0] and "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "1x4x8x8"], "the model fails on 1x4x8x8 float32: RuntimeError: Given groups=1"),
        (["--input", "1x3x8x8", "--input", "1"], "the model fails on 1x3x8x8 float32, 1 float32: TypeError"),
        (["--input", "1x3x8"], "the model fails on 1x3x8 float32"),
        (["--input", "1x3x8x8", "--plot", "no-such-folder/x.png"], "there is no folder no-such-folder"),
    ],
)
def test_what_is_wrong_with_the_rest(models, capsys, arguments, message):
    models.write_text(MODELS.replace("x = self.grouped", "assert x.dim() == 4; x = self.grouped"))
    assert cli.main([f"{models}:make", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_model_is_a_function_a_class_or_an_object_of_a_file_or_module(models, monkeypatch):
    monkeypatch.chdir(models.parent)
    models.rename("advised_models_of_a_test.py")
    for path in ("advised_models_of_a_test.py", "advised_models_of_a_test", "./advised_models_of_a_test.py"):
        for factory in ("make", "Net", "instance"):
            program = Target(f"{path}:{factory}", (Input((1, 3, 4, 4)),)).load()
            assert not program.model.training and len(program.run()) == 1


def every_variant():
    replaced = {choice: ("stem", "grouped") for choice in REPLACEMENTS if not REPLACEMENTS[choice].compiles}
    replaced["dense"] = ("grouped", "depthwise")
    return [
        Variant(),
        Variant(layout="channels_last"),
        Variant(layout="contiguous"),
        Variant(dtype="bfloat16"),
        Variant(dtype="float32"),
        Variant(batch="image by image"),
        Variant(threads=1),
        Variant(layout="channels_last", dtype="bfloat16", replaced=(("dense", ("grouped",)),)),
        *(Variant(replaced=((choice, names),)) for choice, names in replaced.items()),
    ]


class First(nn.Module):
    """The tensor in what the model returns."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def get_submodule(self, name):
        return self.model.get_submodule(name)

    def set_submodule(self, name, module):
        self.model.set_submodule(name, module)

    def forward(self, *inputs):
        return self.model(*inputs)["maps"][0]


@pytest.mark.parametrize("variant", every_variant(), ids=lambda variant: variant.name)
def test_variants_compute_what_the_model_does_and_so_does_their_code(models, variant):
    program = program_of(models)
    [expected] = program.run()
    tolerance = {"rtol": 0.05, "atol": 0.05} if variant.changes_precision else {"rtol": 1e-4, "atol": 1e-5}
    [found] = variants.build(variant, program.copy())()
    torch.testing.assert_close(found.float(), expected, **tolerance)
    names = {"model": First(program.copy().model), "x": program.inputs[0], "torch": torch}
    exec("\n".join(variants.code(variant, [Input((2, 3, 6, 8))])), names)
    torch.testing.assert_close(names["output"], found, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(program.run()[0], expected)  # it has not been changed


def test_variants_of_a_model(models):
    program = program_of(models)

    def names(program, **more):
        options = {"compiling": False, "calls_torchvision": True, "has_separable": True, "has_winograd": True}
        options |= more
        return [variant.name for variant in variants.whole_model_variants(program, 4, **options)]

    assert names(program) == ["channels_last", "bfloat16", "image by image", "1 thread", "2 threads"]
    calls = ["accelerate_torchvision()", "fuse_depthwise_separable()", "use_winograd()"]
    assert names(program, compiling=True)[5:] == [
        "torch.compile",
        "torch.compile, freeze_weights()",
        *(f"torch.compile, freeze_weights(), {call}" for call in calls),
        f"torch.compile, freeze_weights(), {', '.join(calls)}",
        f"torch.compile, freeze_weights(), inference_options(), {', '.join(calls)}",
    ]
    assert names(program, compiling=True, calls_torchvision=False, has_separable=False, has_winograd=False)[5:] == [
        "torch.compile",
        "torch.compile, freeze_weights()",
        "torch.compile, freeze_weights(), inference_options()",
    ]
    low = Program(program.model.bfloat16().to(memory_format=torch.channels_last), (program.inputs[0][:1].bfloat16(),))
    assert names(low)[:2] == ["contiguous", "float32"]
    assert "image by image" not in names(low)


def test_what_compiles_runs_in_a_process_of_its_own_on_the_same_weights(models, tmp_path, monkeypatch):
    program = program_of(models)
    torch.save(program.model.state_dict(), tmp_path / "weights.pt")
    models.write_text(MODELS.replace("return Net()", "torch.manual_seed(7); return Net()"))
    target = Target(f"{models}:make", (Input((2, 3, 6, 8)),), tmp_path / "weights.pt")
    variant = Variant(compiler=("compile", "freeze_weights", "inference_options", "fuse_depthwise_separable"))
    prepared = variants.way(variant, program, target, threads=1).prepare()
    torch.testing.assert_close(prepared.output, program.run(), rtol=1e-4, atol=1e-5)
    assert 0 < prepared.seconds() < 10
    lines = variants.code(variant, target.inputs)
    compiling = "model = torch.compile(model, options=inductor_vision.inference_options())"
    assert lines.index("inductor_vision.freeze_weights()") < lines.index(compiling)


def value(number, seconds=0.0):
    tensor = torch.full((3,), number)
    return lambda: Prepared(lambda: tensor.clone(), [tensor])


def test_only_what_is_right_is_timed(quick):
    def fails():
        raise RuntimeError("no such\nkernel")

    slow = torch.ones(300, 300)
    found = compare(
        Way("first", value(1.0), 1),
        [
            Way("right", value(1.0), 1),
            Way("wrong", value(1.1), 1),
            Way("nan", value(math.nan), 1),
            Way("inexact", value(1.01), 1, low_precision=True),
            Way("fails", fails, 1),
            Way("slow", lambda: Prepared(lambda: slow @ slow, [torch.ones(3)]), 1),
        ],
        0.05,
        lambda text: None,
    )
    rows = {row.name: row for row in found.others}
    assert {name: row.status for name, row in rows.items()} == {
        "right": "ok", "wrong": "wrong", "nan": "wrong", "inexact": "ok", "fails": "failed", "slow": "slow",
    }  # fmt: skip
    assert rows["wrong"].error == pytest.approx(0.1) and rows["wrong"].seconds is None
    assert rows["wrong"].reason == "relative error 1.0e-01, allowed 1e-03"
    assert "no such kernel" in rows["fails"].reason
    assert rows["slow"].ratio.rounds == 0 and rows["slow"].ratio.median > 2
    assert found.noise >= 0.02


@pytest.mark.parametrize("apart", [True, False])
def test_noise_is_that_of_processes_where_others_have_their_own(quick, apart):
    """What the first way differs from itself is seen where it is computed once more, in another process."""
    prepared_apart = []

    def prepare_apart():
        prepared_apart.append(True)
        return Prepared(lambda: time.sleep(0.003), [torch.ones(3)])

    first = Way("first", lambda: Prepared(lambda: time.sleep(0.001), [torch.ones(3)]), 1, prepare_apart=prepare_apart)
    found = compare(first, [dataclasses.replace(first, name="other", has_own_process=apart)], 0.05, lambda text: None)
    assert bool(prepared_apart) == apart
    assert (found.noise > 0.5) == apart


def test_a_run_from_the_command_line(models, tmp_path):
    """The real thing: all but what compiles."""
    command = [sys.executable, "-m", "inductor_vision.advisor", "models:make", "--input", "2x3x12x10"]
    command += ["--seconds", "0.5", "--threads", "1", "--no-compile", "--json", "advice.json", "--plot", "advice.png"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stderr
    out = done.stdout
    assert "models:make on 2x3x12x10 float32" in out
    [line] = [line for line in out.splitlines() if line.startswith("  grouped ")]
    assert "grouped 3x3, 8 -> 8, 4 groups  2x8x12x10" in line
    assert "rest of the model" in out and "as it is" in out
    assert ("What to change" in out) != ("Nothing to change" in out)
    assert "layer 1/4" in done.stderr and "model: preparing channels_last" in done.stderr
    advice = json.loads((tmp_path / "advice.json").read_text())
    grouped = next(layer for layer in advice["layers"] if layer["names"] == ["grouped"])
    assert grouped["calls"] == 2
    assert {c["name"] for c in grouped["comparison"]["others"]} == {
        "channels_last", "bfloat16", "dense", "image by image",
    }  # fmt: skip
    pytest.importorskip("matplotlib")
    assert (tmp_path / "advice.png").read_bytes().startswith(b"\x89PNG")


def measured(name, median, status="ok", rounds=9):
    seconds = Spread(median * 1e-2, median * 1e-2, median * 1e-2)
    return Measured(name, status, "", seconds, Ratio(median, median - 0.01, median + 0.01, rounds), 1e-7)


def an_advice(**more):
    choices = Comparison(Spread(1e-3, 1e-3, 1e-3), 0.02, (measured("dense", 0.5), measured("1 thread", 1.5)))
    layers = (
        LayerResult("a", ("a",), ("a",), "grouped 3x3", "1x8x8x8", 2, 0.6, choices),
        LayerResult("b", ("b",), ("b",), "1-D 3", "1x8x8", 1, 0.1, dataclasses.replace(choices, others=())),
        LayerResult("tiny", ("tiny",), ("tiny",), "plain 3x3", "1x8x8x8", 1, 0.001, None),
    )
    wrong = Measured("torch.compile", "wrong", "relative error 1.0e-01, allowed 1e-03", error=0.1)
    slow = measured("bfloat16", 30.0, "slow", 0)
    settings = advise.Settings(4)
    seconds = Spread(1e-2, 1e-2, 1e-2)
    known = (measured("channels_last", 0.7), wrong, slow)
    return advise.Advice("models:make", "1x3x8x8 float32", MACHINE, settings, seconds, 0.02, layers, known, **more)


def test_the_text():
    change = advise.Recommendation("channels_last", measured("channels_last", 0.7), True, ("model = ...", "y = ..."))
    text = summary.text(an_advice(recommendations=(change,), foreign_cores=1.5, remarks=("by the way",)))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "a grouped 3x3 1x8x8x8 2 60.0% 1.00 dense 5.00 0.500 1e-07" in lines
    assert "b 1-D 3 1x8x8 1 10.0% 1.00 nothing tried" in lines
    assert "1 more 1 0.1%" in lines
    assert "rest of the model 29.9%" in lines
    assert "as it is 10.0 1 +- 2.0%" in lines
    assert "channels_last 7.00 0.700 0.690 .. 0.710 1e-07" in lines
    assert "torch.compile WRONG: relative error 1.0e-01, allowed 1e-03" in lines
    assert "bfloat16 300 30.0 timed once 1e-07" in lines
    assert "1. channels_last: 10.0 -> 7.00 ms, ratio 0.700, in another precision, relative error 1e-07" in lines
    assert lines[lines.index("model = ...") + 1] == "y = ..."
    assert "* by the way" in lines and "other programs kept 1.5 cores busy" in text


def test_the_text_says_when_there_is_nothing_to_change():
    assert "Nothing to change: nothing that was tried" in summary.text(an_advice())
    assert "Interrupted before anything could be recommended." in summary.text(an_advice(interrupted=True))


def test_the_picture(tmp_path):
    pytest.importorskip("matplotlib")
    picture.draw(an_advice(), tmp_path / "advice.png")
    picture.draw(dataclasses.replace(an_advice(), layers=(), variants=()), tmp_path / "empty.png")
    for path in tmp_path.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_an_interrupted_run_shows_what_it_has(models, monkeypatch, quick):
    monkeypatch.setattr(machine, "describe_machine", lambda: MACHINE)

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(advise, "layer_variants", interrupt)
    settings = advise.Settings(1, 0.1, compiling=False)
    target = Target(f"{models}:make", (Input((1, 3, 6, 8)),))
    advice = advise.advise(target, settings, Progress(io.StringIO()))
    assert advice.interrupted and len(advice.layers) == 4 and not advice.variants
    assert "Interrupted" in summary.text(advice)


def test_a_model_without_convolutions(quick, tmp_path):
    path = pathlib.Path(tmp_path, "linear.py")
    path.write_text("from torch import nn\ndef make():\n    return nn.Linear(8, 8)\n")
    settings = advise.Settings(1, 0.1, compiling=False)
    advice = advise.advise(Target(f"{path}:make", (Input((2, 8)),)), settings, Progress(io.StringIO()))
    assert advice.layers == () and advice.rest == 1
    assert "calls no convolution" in summary.text(advice)
