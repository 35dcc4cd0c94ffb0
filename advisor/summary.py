"""Advice as text for a terminal, and as JSON."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from pathlib import Path

from ..perf.report import aligned, busy_warning, machine_line, ms, percent, significant
from .advise import Advice, Recommendation
from .choices import AS_IT_IS
from .measure import Measured
from .recommend import LayerResult

_FORMAT = 1
# Layers that take less of the time are one line; the JSON has all.
_WORTH_A_LINE = 0.005
_LONGEST_NAME = 44
_WIDTH = 120


def write_json(advice: Advice, path: Path) -> None:
    """Everything that was measured."""
    path.write_text(json.dumps({"format": _FORMAT, **dataclasses.asdict(advice)}, indent=1) + "\n")


def text(advice: Advice) -> str:
    """Layers, the whole model, and what to change."""
    head = f"{advice.model} on {advice.inputs}: {ms(advice.seconds.median)} ms"
    parts = [textwrap.fill(machine_line(advice.machine, advice.settings.threads), _WIDTH), head]
    parts.append(_layers(advice) if advice.layers else "The model calls no convolution.")
    parts += [_variants(advice)] if advice.variants else []
    parts.append(_recommendations(advice))
    warning = busy_warning(advice.foreign_cores)
    remarks = [f"* {remark}" for remark in (*advice.remarks, warning) if remark]
    return "\n\n".join([*parts, *(["\n".join(remarks)] if remarks else [])])


def _layers(advice: Advice) -> str:
    lines = [["layer", "convolution", "input", "calls", "share", "ms", "best by itself", "ms", "ratio", "error"]]
    shown = [layer for layer in advice.layers if layer.share >= _WORTH_A_LINE]
    lines += [_layer(layer) for layer in shown]
    others = advice.layers[len(shown) :]
    if others:
        share = sum(layer.share for layer in others)
        calls = sum(layer.calls for layer in others)
        lines.append([f"{len(others)} more", "", "", str(calls), percent(share), "", "", "", "", ""])
    lines.append(["rest of the model", "", "", "", percent(advice.rest), "", "", "", "", ""])
    legend = textwrap.fill(
        "Where the time goes. ms: of one call. Best by itself: with input and weight in that format or dtype already, "
        "against the same call as it is.",
        _WIDTH,
    )
    return "\n".join([legend, *aligned(lines, left=(0, 1, 2, 6))])


def _layer(layer: LayerResult) -> list[str]:
    cells = [_shortened(layer.title), layer.description, layer.input, str(layer.calls), percent(layer.share)]
    if not layer.comparison:
        return [*cells, "", "", "", "", ""]
    cells.append(ms(layer.comparison.seconds.median))
    best = layer.best()
    if not best:
        return [*cells, AS_IT_IS if layer.comparison.others else "nothing tried", "", "", ""]
    return [*cells, best.name, ms(best.seconds.median), significant(best.ratio.median), _error(best)]


def _shortened(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"...{name[3 - _LONGEST_NAME :]}"


def _variants(advice: Advice) -> str:
    lines = [["model", "ms", "ratio", "interval", "error"]]
    lines.append([AS_IT_IS, ms(advice.seconds.median), "1", f"+- {percent(advice.noise)}", ""])
    lines += [_variant(measured) for measured in sorted(advice.variants, key=_order)]
    legend = textwrap.fill(
        "The whole model. Ratio: to the time as it is, with the interval that holds its true median (95 %). The first "
        "interval is noise: what the model differs from itself.",
        _WIDTH,
    )
    return "\n".join([legend, *aligned(lines)])


def _order(measured: Measured) -> tuple[bool, float]:
    return (measured.ratio is None, measured.ratio.median if measured.ratio else 0.0)


def _variant(measured: Measured) -> list[str]:
    if measured.ratio is None or measured.seconds is None:
        return [measured.name, f"{measured.status.upper()}: {' '.join(measured.reason.split())[:160]}"]
    ratio = measured.ratio
    interval = f"{significant(ratio.low)} .. {significant(ratio.high)}" if ratio.rounds else "timed once"
    return [measured.name, ms(measured.seconds.median), significant(ratio.median), interval, _error(measured)]


def _error(measured: Measured) -> str:
    return "" if measured.error is None else f"{measured.error:.0e}" if measured.error else "0"


def _recommendations(advice: Advice) -> str:
    if advice.recommendations:
        lines = ["What to change: the first of these, or one that suits better. Each was measured on the whole model:"]
        for number, recommendation in enumerate(advice.recommendations, 1):
            lines += ["", *_recommendation(number, recommendation, advice)]
        return "\n".join(lines)
    if advice.interrupted:
        return "Interrupted before anything could be recommended."
    return (
        f"Nothing to change: nothing that was tried made the model faster by more than noise, {percent(advice.noise)}."
    )


def _recommendation(number: int, recommendation: Recommendation, advice: Advice) -> list[str]:
    measured = recommendation.measured
    gain = (
        f"{ms(advice.seconds.median)} -> {ms(measured.seconds.median)} ms, ratio {significant(measured.ratio.median)}"
    )
    values = f"relative error {_error(measured)}"
    values = f"in another precision, {values}" if recommendation.changes_precision else values
    return [f"{number}. {recommendation.name}: {gain}, {values}", *(f"       {line}" for line in recommendation.code)]
