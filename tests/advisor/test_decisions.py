"""What the advisor decides, from measurements that nobody made."""

import pytest
from inductor_vision.advisor.choices import BFLOAT16, CHANNELS_LAST, DEFORM, DENSE
from inductor_vision.advisor.measure import Comparison, Measured
from inductor_vision.advisor.recommend import LayerResult, combine, layer_variants, out_of_reach, recommend
from inductor_vision.advisor.statistic import Ratio, is_faster, noise_of
from inductor_vision.advisor.variants import Variant, code
from inductor_vision.perf.results import Spread

SECOND = Spread(1.0, 1.0, 1.0)
LAYOUT, PRECISION = Variant(layout=CHANNELS_LAST), Variant(dtype=BFLOAT16)
COMPILED, FROZEN = Variant(compiler=("compile",)), Variant(compiler=("compile", "freeze_weights"))


def measured(name, ratio, width=0.01):
    return Measured(name, "ok", seconds=SECOND, ratio=Ratio(ratio, ratio - width, ratio + width, 20), error=1e-7)


def comparison(*others, noise=0.02):
    return Comparison(SECOND, noise, others)


def layer(name, *choices, swappable=True, **more):
    return LayerResult(name, (name,), (name,) * swappable, "plain 3x3", "1x8x8x8", 1, 0.1, comparison(*choices), **more)


@pytest.mark.parametrize(("rounds", "low", "high"), [(1, 0, 0), (5, 0, 4), (6, 0, 5), (9, 1, 7), (100, 39, 60)])
def test_the_interval_of_a_median(rounds, low, high):
    """As tables of the binomial distribution have it, e.g. the 40th and 61st of 100."""
    ratio = Ratio.of([float(value) for value in reversed(range(rounds))])
    assert (ratio.low, ratio.high, ratio.rounds) == (low, high, rounds)
    assert ratio.median == (rounds - 1) / 2


def test_faster_is_only_what_is_beyond_noise():
    assert is_faster(Ratio(0.90, 0.85, 0.95, 20), noise=0.02)
    assert not is_faster(Ratio(0.90, 0.80, 1.01, 20), noise=0.02)  # it may be as slow as what there is
    assert not is_faster(Ratio(0.90, 0.85, 0.95, 20), noise=0.06)  # so much the thing differs from itself
    assert not is_faster(Ratio(0.99, 0.985, 0.995, 1000), noise=noise_of(Ratio(1.0, 1.0, 1.0, 1000)))
    assert noise_of(Ratio(0.93, 0.9, 1.1, 20)) == pytest.approx(0.07)
    assert noise_of(Ratio(1.07, 0.9, 1.1, 20)) == pytest.approx(0.07)


def test_wrong_failed_and_slow_choices_are_not_faster():
    rows = [
        Measured("wrong", "wrong", "relative error 1.0e+00", error=1.0),
        Measured("failed", "failed", "RuntimeError"),
        Measured("slow", "slow", seconds=SECOND, ratio=Ratio(3.0, 3.0, 3.0, 0)),
        measured("fast", 0.8),
        measured("faster", 0.6),
    ]
    assert [row.name for row in comparison(*rows).faster()] == ["faster", "fast"]
    assert [row.name for row in comparison(*rows).promising()] == ["fast", "faster"]
    variants = [Variant(threads=i + 1) for i in range(len(rows))]
    assert [m.name for _, m in recommend(zip(variants, rows), 0.02)] == ["faster", "fast"]


def test_nothing_is_recommended_where_nothing_gained():
    assert recommend([(LAYOUT, measured("a", 0.99)), (PRECISION, measured("b", 1.3))], 0.02) == []
    assert recommend([(LAYOUT, measured("a", 0.9, width=0.2))], 0.02) == []
    assert recommend([], 0.02) == []
    assert comparison(measured("a", 0.9, width=0.2)).promising()  # to be measured again, that is all


def test_more_of_the_same_has_to_gain_more():
    def names(frozen):
        pairs = [(COMPILED, measured("compiled", 0.6, 0.03)), (FROZEN, measured("frozen", frozen, 0.03))]
        return [m.name for _, m in recommend(pairs, 0.02)]

    assert names(0.59) == ["compiled"]
    assert names(0.5) == ["frozen", "compiled"]


def test_parts_of_variants():
    assert COMPILED.is_part_of(FROZEN) and not FROZEN.is_part_of(COMPILED) and not FROZEN.is_part_of(FROZEN)
    dense, ours = Variant(replaced=((DENSE, ("a",)),)), Variant(replaced=((DEFORM, ("b",)),))
    assert dense.is_part_of(dense.with_(ours)) and not dense.is_part_of(ours)
    assert LAYOUT.is_part_of(LAYOUT.with_(FROZEN)) and not PRECISION.is_part_of(LAYOUT.with_(FROZEN))


def test_what_can_be_done_at_once():
    assert LAYOUT.goes_with(FROZEN) and not COMPILED.goes_with(FROZEN)
    dense = Variant(replaced=((DENSE, ("a", "b")),))
    assert dense.goes_with(LAYOUT) and dense.goes_with(Variant(replaced=((DENSE, ("c",)),)))
    assert not dense.goes_with(Variant(replaced=((BFLOAT16, ("b", "c")),)))  # a layer has one choice


def combined(pairs, gains):
    """What ``combine`` gives where the second of two variants, added to what is there, has these ratios."""
    asked = []

    def measure(first, others):
        asked.append((first.name, others[0].name))
        return comparison(measured(others[0].name, gains[others[0].name]))

    return [variant.name for variant in combine(pairs, measure)], asked


def test_combinations_begin_with_the_fastest_and_keep_what_helps():
    pairs = [(LAYOUT, measured("", 0.8)), (FROZEN, measured("", 0.6)), (COMPILED, measured("", 0.7))]
    pairs.append((Variant(threads=1), measured("", 0.9)))
    frozen, both = FROZEN.name, f"{FROZEN.name}, channels_last"
    found, asked = combined(pairs, {both: 0.9, f"{both}, 1 thread": 1.0})
    assert found == [both]
    assert asked == [(frozen, both), (both, f"{both}, 1 thread")]


def test_what_helps_only_by_itself_is_not_combined():
    pairs = [(LAYOUT, measured("", 0.8)), (FROZEN, measured("", 0.6))]
    assert combined(pairs, {f"{FROZEN.name}, channels_last": 1.0})[0] == []
    assert combined(pairs[:1], {}) == ([], [])
    assert combined([], {}) == ([], [])


def test_precision_is_changed_last_and_the_precise_combination_is_kept():
    pairs = [(PRECISION, measured("", 0.3)), (LAYOUT, measured("", 0.8)), (FROZEN, measured("", 0.6))]
    precise = f"{FROZEN.name}, channels_last"
    found, _ = combined(pairs, {precise: 0.9, f"{precise}, bfloat16": 0.5})
    assert found == [precise, f"{precise}, bfloat16"]


def test_choices_of_single_layers_become_variants_of_the_model():
    layers = [
        layer("a", measured(DENSE, 0.5), measured(CHANNELS_LAST, 0.6), measured("1 thread", 0.2)),
        layer("b", measured(DENSE, 0.7), measured(BFLOAT16, 0.4)),
        layer("c", measured(DENSE, 0.99), measured(CHANNELS_LAST, 0.9)),
    ]
    assert {variant.replaced for variant in layer_variants(layers)} == {
        ((DENSE, ("a", "b")),),
        ((BFLOAT16, ("b",)),),
        ((CHANNELS_LAST, ("c",)),),
    }


def test_what_won_in_all_layers_is_the_choice_of_the_whole_model():
    layers = [layer(name, measured(CHANNELS_LAST, 0.6)) for name in "ab"]
    assert layer_variants(layers) == []
    assert [v.name for v in layer_variants([*layers, layer("c")])] == ["channels_last in 2 layers"]


def test_a_winner_that_cannot_be_replaced_is_pointed_out():
    layers = [layer("head", measured(DENSE, 0.5), swappable=False), layer("body", measured("1 thread", 0.5))]
    assert layer_variants(layers) == []
    [remark] = out_of_reach(layers)
    assert remark.startswith("head: dense won by itself, but")


def test_code_wraps_long_lists_of_layers_and_runs():
    names = tuple(f"features.{i}.conv.0" for i in range(30))
    lines = code(Variant(replaced=((DENSE, names),)), ())
    assert max(map(len, lines)) <= 110
    compile("\n".join(lines), "code", "exec")
