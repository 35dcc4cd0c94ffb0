"""Whole training steps with deformable layers compile, and give what eager mode gives in float64."""

from __future__ import annotations

import collections
import dataclasses
import functools
import socket
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from inductor_vision.paths import Path, recorded_paths
from inductor_vision.tests.support.compare import assert_close
from inductor_vision.tests.support.compiled import Traced, compile_and_run, run_python, trace_and_run
from inductor_vision.tests.support.training import (
    Classifier,
    Named,
    Step,
    Training,
    assert_same_steps,
    assert_same_tensors,
    batch_of,
    loss_of,
    reference,
)
from torch import Tensor, nn
from torch._dynamo.utils import counters

TOLERANCE = 1e-5  # of gradients and parameters in float32, relative to the largest of a tensor


def counts(paths: Iterable[Path]) -> dict[tuple[str, str], int]:
    return dict(collections.Counter((path.op, path.kind) for path in paths))


def compiled_paths(forward: int, backward: int) -> dict[tuple[str, str], int]:
    return {("deform_conv2d", "template"): forward, ("deform_conv2d_backward", "template"): backward}


def test_a_training_step_compiles_once_for_all_batches():
    batches = [batch_of(4, seed=1), batch_of(4, seed=2), batch_of(7, seed=3)]
    for tensor in batches[0]:
        torch._dynamo.mark_dynamic(tensor, 0)
    model = Classifier()
    expected = reference(model, batches)

    def train(loss_of, model, *first):
        training = Training(model, loss_of, compile_optimizer=True)
        steps = [training.step(*first)]
        with torch.compiler.set_stance("fail_on_recompile"):
            return [*steps, *(training.step(*batch) for batch in batches[1:])]

    compiled = compile_and_run(loss_of, model, *batches[0], run=train, config={"cpp_wrapper": True})
    assert counters["stats"]["unique_graphs"] == 2  # the loss, and the optimizer's step
    assert counts(compiled.paths) == compiled_paths(forward=2, backward=2)
    assert_same_steps(compiled.result, expected, TOLERANCE)


def loss_under_autocast(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return loss_of(model, x, y)


def frozen_in_part() -> nn.Module:
    """The weight of the first deformable layer learns, and what predicts offsets and masks of the second."""
    model = Classifier()
    for frozen in (model.stem, model.grouped.predict, model.depthwise.sample):
        frozen.requires_grad_(False)
    return model


VARIANTS: dict[str, Callable[[], nn.Module]] = {
    "autocast": lambda: Classifier(norm=False, depthwise=False),
    "checkpoint": lambda: Classifier(norm=False, depthwise=False, checkpoint=True),
    "channels_last": lambda: Classifier(depthwise=False).to(memory_format=torch.channels_last),
    "frozen": frozen_in_part,
}


@dataclasses.dataclass(frozen=True)
class Variants:
    """A step of all variants in one graph."""

    traced: Traced
    steps: dict[str, Step]


@pytest.fixture(scope="module")
def variants() -> Variants:
    x, y = batch_of(4)
    channels_last = x.contiguous(memory_format=torch.channels_last)
    models = nn.ModuleDict({name: make() for name, make in VARIANTS.items()})

    def loss_of_all(models, x, channels_last, y):
        return torch.stack([
            loss_under_autocast(models["autocast"], x, y),
            loss_of(models["checkpoint"], x, y),
            loss_of(models["channels_last"], channels_last, y),
            loss_of(models["frozen"], x, y),
        ])  # fmt: skip

    def train(loss_of_all, models, *batch):
        losses = []

        def loss_of(*args):
            losses.append(loss_of_all(*args))
            return losses[0].sum()

        return losses, Training(models, loss_of).step(*batch)

    traced = trace_and_run(loss_of_all, models, x, channels_last, y, run=train)
    (losses,), step = traced.result

    def of_variant(name: str, tensors: Named) -> Named:
        return {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}

    steps = {
        name: Step(loss, of_variant(name, step.gradients), of_variant(name, step.parameters))
        for name, loss in zip(models, losses)
    }
    return Variants(traced, steps)


def test_paths_of_all_variants(variants):
    """One deformable layer each, and two where some are frozen; none is refused."""
    assert counts(variants.traced.paths) == {("deform_conv2d_backward", "eager"): 5}


@pytest.mark.parametrize("name", ["checkpoint", "channels_last", "frozen"])
def test_steps_are_those_of_eager_mode(variants, name):
    expected = reference(VARIANTS[name](), [batch_of(4)])
    assert_same_steps([variants.steps[name]], expected, TOLERANCE)


def test_gradients_under_autocast(variants):
    """The deformable layer is given bfloat16, computes in float32, and returns bfloat16."""
    model = VARIANTS["autocast"]()
    (expected,) = reference(model, [batch_of(4)])
    dtypes = []
    model.grouped.sample.register_forward_hook(lambda _, inputs, out: dtypes.append([t.dtype for t in (*inputs, out)]))
    eager = Training(model, loss_under_autocast).step(*batch_of(4))
    assert dtypes == [[torch.bfloat16] * 4]
    for step in (variants.steps["autocast"], eager):
        assert {gradient.dtype for gradient in step.gradients.values()} == {torch.float32}
        assert_same_tensors(step.gradients, expected.gradients, tolerance=5e-2)
        with pytest.raises(AssertionError):  # some of it was computed in bfloat16
            assert_same_tensors(step.gradients, expected.gradients, tolerance=1e-3)


@pytest.mark.slow
def test_gradients_of_channels_last_are_channels_last():
    """Also before they are accumulated in parameters that are."""
    x, y = batch_of(4)
    model, images = VARIANTS["channels_last"](), x.contiguous(memory_format=torch.channels_last).requires_grad_()
    maps_and_kernels = {"images": images, **{name: p for name, p in model.named_parameters() if p.dim() == 4}}
    gradients: Named = {}
    for name, tensor in maps_and_kernels.items():
        tensor.register_hook(functools.partial(gradients.__setitem__, name))

    def train(loss_of, model, *batch):
        return Training(model, loss_of).step(*batch)

    compiled = compile_and_run(loss_of, model, images, y, config={"cpp_wrapper": True}, run=train)
    assert counts(compiled.paths) == compiled_paths(forward=1, backward=1)
    assert_same_steps([compiled.result], reference(VARIANTS["channels_last"](), [(x, y)]), TOLERANCE)
    assert set(gradients) == {"images", "stem.weight", "grouped.predict.weight", "grouped.sample.weight"}
    for name, gradient in gradients.items():
        assert gradient.is_contiguous(memory_format=torch.channels_last), name


def test_frozen_parameters_have_no_gradient(variants):
    learning = {name.rpartition(".")[0] for name in variants.steps["frozen"].gradients}
    assert learning == {"grouped.sample", "norm", "depthwise.predict", "head"}


def test_checkpoints_in_eager_mode():
    """What is between them is computed a second time, in the backward pass, and nothing else changes."""
    with recorded_paths() as kept:
        expected = Training(Classifier(norm=False)).step(*batch_of(4))
    with recorded_paths() as recomputed:
        actual = Training(Classifier(norm=False, checkpoint=True)).step(*batch_of(4))
    assert counts(kept) == {("deform_conv2d", "eager"): 2, ("deform_conv2d_backward", "eager"): 2}
    assert counts(recomputed) == {("deform_conv2d", "eager"): 3, ("deform_conv2d_backward", "eager"): 2}
    assert_same_steps([actual], [expected], tolerance=0)


# Of one process: its share of each batch, with the gradients averaged over all of them.
TRAIN_IN_PARALLEL = """
import datetime, sys
import torch
import torch._inductor.config
from inductor_vision.paths import recorded_paths
from inductor_vision.tests.support.compiled import caches_disabled
from inductor_vision.tests.support.training import Classifier, Training, loss_of
from torch.nn.parallel import DistributedDataParallel

rank, rendezvous, batches, results = int(sys.argv[1]), *sys.argv[2:]
torch.set_num_threads(2)
torch.distributed.init_process_group(
    "gloo", init_method=rendezvous, rank=rank, world_size=2, timeout=datetime.timedelta(seconds=120)
)
model = Classifier(norm=False, depthwise=False)
compiled = torch.compile(DistributedDataParallel(model))
training = Training(model, lambda model, x, y: loss_of(compiled, x, y))
with caches_disabled(), recorded_paths() as paths:
    steps = [training.step(x.chunk(2)[rank], y.chunk(2)[rank]) for x, y in torch.load(batches)]
torch.distributed.destroy_process_group()
torch.save((steps, paths), results)
"""


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
def test_data_parallel(tmp_path):
    """Two processes with half of each batch compute what one computes with all of it."""
    batches = [batch_of(8, seed=1), batch_of(8, seed=2)]
    torch.save(batches, tmp_path / "batches.pt")
    loopback = {"GLOO_SOCKET_IFNAME": "lo"} if "lo" in {name for _, name in socket.if_nameindex()} else {}

    def train(rank: int) -> tuple[list[Step], list[Path]]:
        results = tmp_path / f"{rank}.pt"
        arguments = str(rank), f"file://{tmp_path}/rendezvous", str(tmp_path / "batches.pt"), str(results)
        run_python(TRAIN_IN_PARALLEL, *arguments, **loopback)
        return torch.load(results, weights_only=False)

    with ThreadPoolExecutor() as pool:
        processes = list(pool.map(train, range(2)))
    for _, paths in processes:
        assert counts(paths) == compiled_paths(forward=1, backward=1)
    expected = reference(Classifier(norm=False, depthwise=False), batches)
    for first, second, whole in zip(*(steps for steps, _ in processes), expected):
        assert_close((first.loss + second.loss) / 2, whole.loss, torch.float32)
        for step in (first, second):
            assert_same_tensors(step.gradients, whole.gradients, TOLERANCE)
            assert_same_tensors(step.parameters, whole.parameters, TOLERANCE)
