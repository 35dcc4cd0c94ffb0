"""The whole of it: run a model, measure its convolutions, measure the model, and say what to change."""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..perf.interleaving import collection_off, threads_restored
from ..perf.machine import describe_machine
from ..perf.progress import Progress
from ..perf.results import Spread
from ..perf.spec import Prepared, UserError
from ..perf.verify import relative_error
from .capture import Capture, Layer, capture
from .choices import Choice, as_it_is, choices_of
from .measure import Comparison, Measured, Way, compare
from .recommend import LayerResult, combine, layer_variants, out_of_reach, recommend
from .target import Program, Target, describe_error
from .variants import Variant, code, way, whole_model_variants

# Parts of the time for measuring.
_FOR_CAPTURE, _FOR_LAYERS, _FOR_VARIANTS, _FOR_COMBINATIONS, _FOR_THE_LAST_WORD = 0.05, 0.35, 0.25, 0.1, 0.25
# A layer that takes less of the model's time is not measured: whatever is chosen for it, nobody would notice.
_NEGLIGIBLE = 0.002
_SAME_AGAIN = 1e-3


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to measure. ``seconds`` is the time for measuring; compiling comes on top of it."""

    threads: int
    seconds: float = 60.0
    compiling: bool = True


@dataclasses.dataclass(frozen=True)
class Recommendation:
    """Something that made the model faster, and the lines of code that do it."""

    name: str
    measured: Measured
    changes_precision: bool
    code: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Advice:
    """What was found.

    Attributes:
        model, inputs: what was asked for.
        machine: see :func:`~inductor_vision.perf.machine.describe_machine`.
        seconds: of a run of the model as it is.
        noise: by how much it differs from itself.
        layers: its convolutions, by the time that they take.
        variants: the model with something changed, each compared with the model as it is.
        recommendations: by gain; empty where nothing gained.
        remarks: what else should be known, a sentence each.
        foreign_cores: how many cores other programs kept busy, on average; None where it is not known.
        interrupted: whether the user broke it off; what had been measured until then is here.
    """

    model: str
    inputs: str
    machine: dict[str, Any]
    settings: Settings
    seconds: Spread
    noise: float
    layers: tuple[LayerResult, ...] = ()
    variants: tuple[Measured, ...] = ()
    recommendations: tuple[Recommendation, ...] = ()
    remarks: tuple[str, ...] = ()
    foreign_cores: float | None = None
    interrupted: bool = False

    @property
    def rest(self) -> float:
        """The part of the model's time that is not in its convolutions."""
        return max(0.0, 1 - sum(layer.share for layer in self.layers))


def advise(target: Target, settings: Settings, progress: Progress) -> Advice:
    """Measure, and recommend what gained.

    Raises:
        UserError: the model cannot be had, does not run on these inputs, or its results cannot be compared.
    """
    with threads_restored(), tempfile.TemporaryDirectory(prefix="inductor_vision_perf_") as folder:
        torch.set_num_threads(settings.threads)
        progress.say(f"loading {target.path}")
        program = target.load()
        _check_runs(program, target)
        if settings.compiling:
            target = dataclasses.replace(target, weights=Path(folder, "weights.pt"))
            torch.save(program.model.state_dict(), target.weights)
        return _Session(target, program, settings, progress).run()


def _check_runs(program: Program, target: Target) -> None:
    try:
        first, second = program.run(), program.run()
    except Exception as error:  # the model is the user's: whatever it raises is what is to be said
        raise UserError(f"the model fails on {target.describe_inputs()}: {describe_error(error)}") from error
    if not first:
        raise UserError("the model returns no tensor, so that no choice can be checked")
    if relative_error(first, first) == math.inf:
        raise UserError("the model's result is not finite on random inputs, so that no choice can be checked")
    if relative_error(second, first) > _SAME_AGAIN:
        raise UserError("the model returns something else at each call, so that no choice can be checked")


@dataclasses.dataclass
class _Session:
    """One run of the advisor; what is found so far is kept, so that an interrupted run has something to show."""

    target: Target
    program: Program
    settings: Settings
    progress: Progress
    layers: list[LayerResult] = dataclasses.field(default_factory=list)
    measured: dict[Variant, Measured] = dataclasses.field(default_factory=dict)
    last: Comparison | None = None
    seen: Capture | None = None
    remarks: list[str] = dataclasses.field(default_factory=list)
    foreign: list[float] = dataclasses.field(default_factory=list)
    prepared: dict[Variant, Prepared] = dataclasses.field(default_factory=dict)  # compiled once, measured several times

    def run(self) -> Advice:
        interrupted, recommended = False, []
        try:
            self._watch()
            self._measure_layers()
            recommended = self._measure_model()
        except KeyboardInterrupt:
            interrupted = True
        finally:
            self.progress.done()
        seconds = self.last.seconds if self.last else Spread.of([self.seen.seconds if self.seen else math.nan])
        return Advice(
            self.target.path,
            self.target.describe_inputs(),
            describe_machine(),
            self.settings,
            seconds,
            self.last.noise if self.last else 0.0,
            tuple(self.layers),
            tuple(self.measured.values()),
            tuple(self._recommendation(variant, measured) for variant, measured in recommended),
            (*self.remarks, *out_of_reach(self.layers)),
            statistics.fmean(self.foreign) if self.foreign else None,
            interrupted,
        )

    def _recommendation(self, variant: Variant, measured: Measured) -> Recommendation:
        return Recommendation(
            variant.name, measured, variant.changes_precision, tuple(code(variant, self.target.inputs))
        )

    def _watch(self) -> None:
        self.progress.say("watching the model run")
        say = self._passing("watching the model run")
        self.seen = capture(self.program, _FOR_CAPTURE * self.settings.seconds, say)

    def _measure_layers(self) -> None:
        work = [(layer, self._choices(layer)) for layer in self.seen.layers]
        every = sum(1 + len(choices) for _, choices in work)
        with collection_off():
            for number, (layer, choices) in enumerate(work, 1):
                label = f"layer {number}/{len(work)}, {_title(layer)}"
                self.progress.say(label)
                seconds = _FOR_LAYERS * self.settings.seconds * (1 + len(choices)) / every
                self.layers.append(self._layer_result(layer, choices, seconds, self._passing(label)))

    def _choices(self, layer: Layer) -> list[Choice]:
        return choices_of(layer, self.settings.threads, compiling=self.settings.compiling)

    def _layer_result(
        self, layer: Layer, choices: Sequence[Choice], seconds: float, say: Callable[[str], None]
    ) -> LayerResult:
        comparison = None
        if self.seen.share(layer) >= _NEGLIGIBLE:
            first, *others = (
                Way(c.name, c.prepare, c.threads or self.settings.threads, _is_low(c, layer))
                for c in (as_it_is(layer), *choices)
            )
            try:
                comparison = self._kept(compare(first, others, seconds, say))
            except Exception as error:  # of the layer as it is: without that nothing can be said about it
                self.remarks.append(f"{_title(layer)} fails outside of the model: {describe_error(error)}")
        return LayerResult(
            _title(layer),
            layer.names,
            layer.swappable,
            layer.describe(),
            str(layer.input),
            layer.calls,
            self.seen.share(layer),
            comparison,
        )

    def _measure_model(self) -> list[tuple[Variant, Measured]]:
        """Each variant by itself, then combinations of what seems to help, and then all that may be recommended once
        more: it may have been luck among so many, and only now are there few enough for many rounds."""
        variants = self._variants()
        self._compare_with_the_model("model", variants, _FOR_VARIANTS)
        promising = {measured.name for measured in self.last.promising()}
        promising = {variant: measured for variant, measured in self.measured.items() if measured.name in promising}
        self.prepared = {variant: self.prepared[variant] for variant in (Variant(), *promising)}
        each = _FOR_COMBINATIONS / max(1, len(promising) - 1)  # as many are tried at most
        combinations = combine(promising.items(), functools.partial(self._compare, "combinations", part=each))
        again = [*promising, *combinations]
        if not again:
            return []
        self._compare_with_the_model("once more", again, _FOR_THE_LAST_WORD)
        return recommend([(variant, self.measured[variant]) for variant in again], self.last.noise)

    def _variants(self) -> list[Variant]:
        whole = whole_model_variants(
            self.program,
            self.settings.threads,
            compiling=self.settings.compiling,
            calls_torchvision=self.seen.calls_torchvision,
            has_separable=self.seen.has_separable,
            has_winograd=self.seen.has_winograd,
        )
        return [*whole, *layer_variants(self.layers)]

    def _compare_with_the_model(self, label: str, variants: Sequence[Variant], part: float) -> None:
        self.last = self._compare(label, Variant(), variants, part)
        rows = {row.name: row for row in self.last.others}
        self.measured |= {variant: rows[variant.name] for variant in variants}

    def _compare(self, label: str, first: Variant, others: Sequence[Variant], part: float) -> Comparison:
        self.progress.say(f"{label}: {', '.join(variant.name for variant in others)}")
        first_way, *ways = map(self._way, (first, *others))
        seconds = part * self.settings.seconds
        return self._kept(compare(first_way, ways, seconds, self._preparing(label)))

    def _way(self, variant: Variant) -> Way:
        new = way(variant, self.program, self.target, self.settings.threads)

        def prepare() -> Prepared:
            if variant not in self.prepared:
                self.prepared[variant] = new.prepare()
            return self.prepared[variant]

        return dataclasses.replace(new, prepare=prepare)

    def _kept(self, comparison: Comparison) -> Comparison:
        self.foreign += [comparison.foreign_cores] if comparison.foreign_cores is not None else []
        return comparison

    def _passing(self, label: str) -> Callable[[str], None]:
        return lambda text: self.progress.say(f"{label}: {text}", passing=True)

    def _preparing(self, label: str) -> Callable[[str], None]:
        """What may take minutes, as compiling does, is no passing detail."""
        return lambda text: self.progress.say(f"{label}: {text}", passing=not text.startswith("preparing"))


def _title(layer: Layer) -> str:
    first = layer.names[0] or "the model"
    return first if len(layer.names) == 1 else f"{first} and {len(layer.names) - 1} more"


def _is_low(choice: Choice, layer: Layer) -> bool:
    return choice.changes_precision or layer.input.dtype in (torch.bfloat16, torch.float16)
