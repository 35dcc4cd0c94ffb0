"""examples/train.py: a compiled step takes the kernels and computes what an eager one does; samples, picture."""

import importlib.util
import pathlib
import re
import sys
from collections import Counter

import pytest
import torch
from inductor_vision.paths import recorded_paths

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
image_module = pytest.importorskip("PIL.Image")

# An answer from Inductor's cache would tell no paths; dozens of kernels compile faster as one file.
UNCACHED = {"force_disable_caches": True, "cpp_wrapper": True}

PROGRAM = pathlib.Path(__file__).parents[2] / "examples" / "train.py"


@pytest.fixture(scope="module")
def example():
    """The module examples/train.py."""
    spec = importlib.util.spec_from_file_location("train_example", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look their module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.slow
def test_program(example, tmp_path, monkeypatch, capsys):
    data = example.load_data()
    some, tests = slice(2 * example.BATCH), slice(40)
    few = example.Data(
        data.digits[some], data.labels[some], [test[tests] for test in data.test_pictures], data.test_labels[tests]
    )
    monkeypatch.setattr(example, "load_data", lambda: few)
    monkeypatch.setattr(sys, "argv", ["train.py", "--epochs", "1", "--eager", "--out", str(tmp_path / "out")])
    example.main()
    printed = capsys.readouterr()
    rows = re.findall(r"^(\w+) +([\d,]+) +([\d.]+) % +([\d.]+) ms +([\d.]+) s +-$", printed.out, re.MULTILINE)
    assert [kind for kind, *_ in rows] == ["plain", "deformable"], printed.out
    assert "deformable epoch 1 of 1: loss" in printed.err
    picture = tmp_path / "out" / "train.png"
    assert printed.out.endswith(f"wrote {picture}\n")
    with image_module.open(picture) as drawn:
        assert min(drawn.size) > 800


@pytest.mark.slow
def test_compiled_step(example):
    pictures, labels = next(example.load_data().batches(torch.Generator().manual_seed(0)))
    eager, compiled = example.make_network("deformable"), example.make_network("deformable")
    with torch.no_grad():
        for layer in (1, 2):  # off the kinks of the interpolation
            eager[layer][0].where.bias.normal_()
    compiled.load_state_dict(eager.state_dict())

    expected = example.training_step(eager, example.make_optimizer(eager), pictures, labels)
    with recorded_paths() as paths, torch._inductor.config.patch(UNCACHED):
        run = torch.compile(compiled, fullgraph=True, dynamic=False)
        loss = example.training_step(run, example.make_optimizer(compiled), pictures, labels)
    assert Counter(path.op for path in paths) == {"deform_conv2d": 2, "deform_conv2d_backward": 2}
    assert {path.kind for path in paths} == {"template"}, paths
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    gradients, exact = ({name: value.grad for name, value in n.named_parameters()} for n in (compiled, eager))
    torch.testing.assert_close(gradients, exact, rtol=1e-3, atol=1e-5)


def test_as_many_parameters(example):
    plain, deformable = (
        sum(value.numel() for value in example.make_network(kind).parameters()) for kind in ("plain", "deformable")
    )
    assert deformable <= plain < 1.03 * deformable


def test_same_pictures_of_the_same_seed(example):
    data = example.load_data()
    first, again, other = (next(data.batches(torch.Generator().manual_seed(seed)))[0] for seed in (0, 0, 1))
    assert first.shape == (example.BATCH, 1, example.SIZE, example.SIZE)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.min() >= 0 and 0.9 < first.max() <= 1


def test_samples(example):
    """Offsets and masks that are the same everywhere: where samples are can be said beforehand."""
    network = example.make_network("deformable").eval()
    upper_move, lower_move = torch.tensor([0.5, -0.25]), torch.tensor([-1.25, 2.0])  # (y, x)
    with torch.no_grad():
        network[2][0].where.bias[:18] = upper_move.repeat(9)
        network[1][0].where.bias[:18] = lower_move.repeat(9)
    place = torch.tensor([2.0, 3.0])
    points, masks = example.samples(network, torch.rand(1, example.SIZE, example.SIZE), place)
    expected = [
        (2 * (2 * place + upper_move + lower_move) + 2 * torch.tensor([i + k, j + m])).tolist()
        for i in (-1, 0, 1)
        for j in (-1, 0, 1)
        for k in (-1, 0, 1)
        for m in (-1, 0, 1)
    ]
    torch.testing.assert_close(points, torch.tensor(expected))
    torch.testing.assert_close(masks, torch.full((81,), 0.25))


def test_without_torchvision(example, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.ops", None)  # importing it raises
    with pytest.raises(SystemExit, match="torchvision cannot be imported"):
        example.deformable_class("torchvision")
