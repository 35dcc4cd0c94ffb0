"""Advice as a picture: where the time goes, what choices would make of it, and what they made of the whole model."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..perf.plot import COLORS, PLAIN
from ..perf.report import machine_line, ms, percent, significant
from .advise import Advice
from .choices import AS_IT_IS
from .measure import Measured
from .recommend import LayerResult

_AS_IT_IS, _BETTER, _REST = COLORS["peer"], COLORS["ours"], "0.75"
_MOST_LAYERS = 20
_BAR_INCHES = 0.3
_LONGEST_BAR = 2.0
_NAME_WIDTH = 36


def draw(advice: Advice, path: Path) -> None:
    """Write a PNG.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    layers = advice.layers[:_MOST_LAYERS]
    variants = sorted((m for m in advice.variants if m.ratio), key=lambda measured: measured.ratio.median)
    rows = len(layers) + bool(advice.layers[_MOST_LAYERS:]) + 1, len(variants) + 1
    figure, (upper, lower) = plt.subplots(
        2, 1, figsize=(11, 2.6 + _BAR_INCHES * sum(rows)), height_ratios=[row + 1 for row in rows]
    )
    _draw_layers(upper, layers, advice)
    _draw_variants(lower, variants, advice)
    inch = 1 / figure.get_figheight()
    title = f"{advice.model} on {advice.inputs}: {ms(advice.seconds.median)} ms"
    figure.text(0.01, 1 - 0.1 * inch, title, va="top", weight="bold", fontsize=11)
    note = textwrap.fill(f"Medians of interleaved rounds. {machine_line(advice.machine, advice.settings.threads)}", 165)
    figure.text(0.5, 0.1 * inch, note, ha="center", fontsize=6.5, color="0.35")
    figure.tight_layout(rect=(0, (0.15 + 0.12 * note.count("\n")) * inch, 1, 1 - 0.3 * inch))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_layers(axis: Any, layers: Sequence[LayerResult], advice: Advice) -> None:
    """Two bars for each layer, one in the other: its share as it is, and with its best choice."""
    names = []
    for y, layer in enumerate(layers):
        axis.barh(y, layer.share, height=0.8, color=_AS_IT_IS)
        best, label = layer.best(), f" {percent(layer.share)}"
        if best:
            axis.barh(y, layer.share * best.ratio.median, height=0.4, color=_BETTER)
            label += f"  {best.name}: {significant(best.ratio.median)}"
        axis.text(layer.share, y, label, va="center", fontsize=7.5)
        calls = f", {layer.calls} calls" if layer.calls > 1 else ""
        names.append((layer.title, f"{layer.description} on {layer.input}{calls}"))
    others = advice.layers[len(layers) :]
    sums = [(f"{len(others)} other convolutions", sum(layer.share for layer in others), _AS_IT_IS)] if others else []
    for name, share, color in [*sums, ("rest of the model", advice.rest, _REST)]:
        axis.barh(len(names), share, height=0.8, color=color)
        axis.text(share, len(names), f" {percent(share)}", va="center", fontsize=7.5)
        names.append((name, ""))
    _finish(axis, names, "Where the time goes")
    _legend(axis, {"as it is": _AS_IT_IS, "with the choice that is best by itself": _BETTER})
    axis.set_xlim(0, 1.3 * max([advice.rest, *(layer.share for layer in advice.layers)]))
    axis.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")


def _draw_variants(axis: Any, variants: Sequence[Measured], advice: Advice) -> None:
    """One bar each, as a multiple of the time as it is, which is cut off where it is very long."""
    recommended = {recommendation.name for recommendation in advice.recommendations}
    longest = min(_LONGEST_BAR, max([1.0, *(m.ratio.high for m in variants if m.ratio.rounds)]))
    axis.axvspan(1 - advice.noise, 1 + advice.noise, color="0.93", zorder=-1)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.barh(0, 1, height=0.8, color=_AS_IT_IS)
    axis.text(1, 0, f" {ms(advice.seconds.median)} ms", va="center", fontsize=7.5)
    for y, measured in enumerate(variants, 1):
        ratio = measured.ratio
        axis.barh(y, min(ratio.median, longest), height=0.8, color=_BETTER if measured.name in recommended else _REST)
        label = f" {ms(measured.seconds.median)} ms, x {significant(ratio.median)}"
        if ratio.median > longest:
            label = f" ...{label}"
        else:
            axis.plot([ratio.low, min(ratio.high, longest)], [y, y], color="0.35", linewidth=0.9)
        end = min(max(ratio.median, ratio.high), longest)
        axis.text(end, y, label, va="center", fontsize=7.5, bbox=PLAIN if end < 1 else None)
    _finish(axis, [(AS_IT_IS, ""), *((textwrap.fill(m.name, _NAME_WIDTH), "") for m in variants)], "The whole model")
    _legend(axis, {"recommended": _BETTER, "not recommended": _REST, "noise": "0.93"})
    axis.set_xlim(0, 1.3 * longest)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")


def _finish(axis: Any, names: Sequence[tuple[str, str]], title: str) -> None:
    """Names, and what is to be said about each in small below it."""
    axis.set_yticks(range(len(names)), [f"{name}\n" if about else name for name, about in names], fontsize=7.5)
    for y, (_, about) in enumerate(names):
        place = {"xy": (0, y), "xycoords": axis.get_yaxis_transform(), "textcoords": "offset points"}
        axis.annotate(about, xytext=(-3.5, -7), ha="right", fontsize=6.5, color="0.4", **place)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.set_title(title, loc="left", fontsize=9.5, weight="bold")
    axis.tick_params(axis="x", labelsize=8)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", color="0.9")
    axis.set_axisbelow(True)
    axis.spines[["top", "right", "left"]].set_visible(False)


def _legend(axis: Any, colors: Mapping[str, str]) -> None:
    import matplotlib.pyplot as plt

    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color in colors.values()]
    place = {"loc": "lower right", "bbox_to_anchor": (1, 0.99), "ncols": len(colors)}
    axis.legend(handles, list(colors), frameon=False, fontsize=7.5, **place)
