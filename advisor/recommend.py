"""From measurements to recommendations. Nothing is measured here, and nothing is recommended that was not measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

from .choices import CHANNELS_LAST, CONTIGUOUS, DTYPES, REPLACEMENTS
from .measure import Comparison, Measured
from .statistic import Ratio, is_faster
from .variants import Variant

# Measures variants and gives back how they did; the first one is what the others are compared with.
Measure = Callable[[Variant, Sequence[Variant]], Comparison]


@dataclasses.dataclass(frozen=True)
class LayerResult:
    """What was measured of one layer.

    Attributes:
        title: the module that computes it, and how many more do.
        names: all of them.
        swappable: those in whose place another module may be put.
        description, input: kind and sizes; shape, dtype and memory format.
        calls: in one run of the model.
        share: of the time of the model.
        comparison: of the choices for it with what it is; None if it is too short to matter.
    """

    title: str
    names: tuple[str, ...]
    swappable: tuple[str, ...]
    description: str
    input: str
    calls: int
    share: float
    comparison: Comparison | None

    def best(self) -> Measured | None:
        """The fastest choice that is faster than what there is, beyond noise."""
        return next(iter(self.comparison.faster()), None) if self.comparison else None

    def replacement(self, *, precise: bool) -> str | None:
        """The fastest such choice that is made by replacing the module; ``precise``: of those that keep the dtype."""
        faster = self.comparison.faster() if self.comparison else []
        names = [c.name for c in faster if c.name in REPLACEMENTS and not (precise and c.name in DTYPES)]
        return names[0] if names else None


def layer_variants(layers: Sequence[LayerResult]) -> list[Variant]:
    """For each choice that won in some layers by itself, the model with that choice in those layers.

    A memory format or dtype that won in all layers is the choice of the whole model, which is measured anyway.
    """
    groups: dict[str, list[LayerResult]] = {}
    for layer in layers:
        for choice in dict.fromkeys((layer.replacement(precise=True), layer.replacement(precise=False))):
            if choice and layer.swappable:
                groups.setdefault(choice, []).append(layer)
    measured = [layer for layer in layers if layer.comparison]
    return [
        Variant(replaced=((choice, tuple(dict.fromkeys(name for layer in won for name in layer.swappable))),))
        for choice, won in groups.items()
        if choice not in (CHANNELS_LAST, CONTIGUOUS, *DTYPES) or len(won) < len(measured)
    ]


def combine(singles: Iterable[tuple[Variant, Measured]], measure: Measure) -> list[Variant]:
    """Put together what helps, as long as it does: the best combination, and the best that keeps precision.

    The fastest variant is the beginning. The others are added in the order of their gains, those that change precision
    last, and each stays only if the model is faster with it than without it, beyond noise.
    """
    ordered = sorted(singles, key=lambda pair: (pair[0].changes_precision, pair[1].ratio.median))
    found: list[Variant] = []
    best: Variant | None = None
    for variant, _ in ordered:
        if best is None:
            best = variant
        elif best.goes_with(variant):
            together = best.with_(variant)
            if measure(best, [together]).faster():
                found = [v for v in found if v.changes_precision != together.changes_precision] + [together]
                best = together
    return found


def recommend(measured: Iterable[tuple[Variant, Measured]], noise: float) -> list[tuple[Variant, Measured]]:
    """What is faster than the model as it is, beyond noise, by gain.

    Where one variant is another and more, it has to be faster than that as well: the median of each is outside of the
    other's interval.
    """
    faster = [(variant, m) for variant, m in measured if m.ratio and is_faster(m.ratio, noise)]

    def worth_it(variant: Variant, ratio: Ratio) -> bool:
        parts = [m.ratio for part, m in faster if part.is_part_of(variant)]
        return all(ratio.median < part.low and ratio.high < part.median for part in parts)

    return sorted(
        ((variant, m) for variant, m in faster if worth_it(variant, m.ratio)), key=lambda pair: pair[1].ratio.median
    )


def out_of_reach(layers: Sequence[LayerResult]) -> list[str]:
    """What won by itself in layers that no other module can take the place of, in a sentence each."""
    return [
        f"{layer.title}: {layer.best().name} won by itself, but the convolution is part of a larger module's code: "
        "nothing else can be put in its place to measure the whole model"
        for layer in layers
        if layer.replacement(precise=False) and not layer.swappable
    ]
