"""The picture ``docs/speed.png`` and the README's tables: how much longer others take for models and operators."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .report import ms, multiple, significant
from .results import CaseResult, Report, Row
from .spec import UserError

# What is drawn, where there are results: title, suite and case.
_MODELS = (
    ("Faster R-CNN", "detectors", "fasterrcnn_resnet50_fpn"),
    ("Mask R-CNN", "detectors", "maskrcnn_resnet50_fpn"),
    ("RetinaNet", "detectors", "retinanet_resnet50_fpn"),
    ("SSD300", "detectors", "ssd300_vgg16"),
    ("ResNet-50", "classifiers", "resnet50-b1"),
    ("MobileNetV2", "classifiers", "mobilenet_v2-b1"),
    ("MobileNetV3-Large", "classifiers", "mobilenet_v3_large-b1"),
)
_OPERATORS = (
    ("deform_conv2d", "deform_conv2d", "s64-b1"),
    ("its gradients", "deform_conv2d_backward", "s64-b1"),
    ("depthwise deform_conv2d", "deform_conv2d", "depthwise-512-32-b1"),
    ("roi_align", "roi_align", "p3-k1000"),
    ("multiscale_roi_align", "multiscale_roi_align", "fpn-k1000"),
    ("roi_pool", "roi_pool", "p3-k1000"),
    ("nms", "nms", "20000"),
    ("patch_conv2d", "patch_conv2d", "8x8"),
    ("depthwise_separable_conv2d", "depthwise_separable_conv2d", "224-b1"),
)
# What is in the README's tables: whole models, in two precisions, and operators.
_TABLE_OF_MODELS = (
    ("Faster R-CNN, ResNet-50 FPN", "detectors", "fasterrcnn_resnet50_fpn"),
    ("RetinaNet, ResNet-50 FPN", "detectors", "retinanet_resnet50_fpn"),
    ("SSD300, VGG-16", "detectors", "ssd300_vgg16"),
    ("ResNet-50", "classifiers", "resnet50-b1"),
    ("MobileNetV2", "classifiers", "mobilenet_v2-b1"),
)
_TABLE_OF_OPERATORS = (
    ("`deform_conv2d`, 256 channels, 64 x 64", "deform_conv2d", "s64-b1"),
    ("its gradients", "deform_conv2d_backward", "s64-b1"),
    ("`roi_align`, 1000 boxes on 256 channels, 100 x 136", "roi_align", "p3-k1000"),
    ("`nms`, 20000 boxes", "nms", "20000"),
    ("`depthwise_separable_conv2d`, 64 to 128 channels, 224 x 224", "depthwise_separable_conv2d", "224-b1"),
    ("`patch_conv2d`, 5120 patches of 8 x 8", "patch_conv2d", "8x8"),
)
_BEGIN = "<!-- Written by `python -m inductor_vision.perf report`. -->\n"
_END = "<!-- The end of the tables. -->\n"


@dataclasses.dataclass(frozen=True)
class _Columns:
    """Who is compared, by the names of contenders, the first of which that was measured counts.

    Attributes:
        ours: this package, as users compile it; times are multiples of this one's.
        others: by title.
    """

    ours: tuple[str, ...]
    others: dict[str, tuple[str, ...]]


# PyTorch's own way has another name in each kind of suite.
_EAGER, _ONNX_RUNTIME, _OPENVINO = "torchvision, PyTorch (eager)", "ONNX Runtime", "OpenVINO"
_FLOAT32 = _Columns(
    ("ours-frozen", "ours-compiled"),
    {
        _EAGER: ("torchvision", "stock", "eager", "conv2d", "convolutions"),
        _ONNX_RUNTIME: ("onnxruntime",),
        _OPENVINO: ("openvino",),
    },
)
_WINOGRAD = "with `winograd=True`"
_MODELS_IN = {
    "float32": _Columns(
        _FLOAT32.ours, {_WINOGRAD: ("ours-winograd",), "as a package": ("ours-aoti",), **_FLOAT32.others}
    ),
    "bfloat16": _Columns(
        ("ours-bf16",),
        {
            _WINOGRAD: (),
            "as a package": ("ours-aoti-bf16",),
            _EAGER: (),
            _ONNX_RUNTIME: (),
            _OPENVINO: ("openvino-default",),
        },
    ),
}
_COLORS = ("#f79646", "#8c96a6", "#9467bd")
_OUR_COLOR = "#2171b5"
_DIGEST = "Comment"  # where the PNG says what it was drawn from
_BAR_INCHES = 0.155


@dataclasses.dataclass(frozen=True)
class _Group:
    """The bars of one row of the picture: multiples of the time of this package, which is in milliseconds."""

    title: str
    milliseconds: str
    peers: dict[str, float]


def digest(results: dict[str, list[Report]]) -> str:
    """A digest of all that is drawn; the picture holds the one of what it was drawn from."""
    drawn = [[dataclasses.asdict(group) for group in _groups(rows, results)] for rows in (_MODELS, _OPERATORS)]
    return hashlib.sha256(json.dumps([drawn, _machines(results)]).encode()).hexdigest()


def drawn_from(path: Path) -> str | None:
    """The digest that a picture holds."""
    from PIL import Image

    with Image.open(path) as image:
        return image.info.get(_DIGEST)


def draw(results: dict[str, list[Report]], path: Path) -> None:
    """Write the PNG.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [("Whole models", _groups(_MODELS, results)), ("Operators", _groups(_OPERATORS, results))]
    heights = [sum(len(group.peers) + 1 for group in groups) for _, groups in panels]
    figure, axes = plt.subplots(1, 2, figsize=(10.5, 1.6 + _BAR_INCHES * max(heights)), width_ratios=(1, 1.25))
    for axis, (title, groups) in zip(axes, panels):
        _draw_panel(axis, title, groups)
    inch = 1 / figure.get_figheight()
    figure.text(
        0.01, 1 - 0.08 * inch, "Time of a call, relative to inductor_vision", va="top", weight="bold", fontsize=12.5
    )
    figure.text(0.01, 1 - 0.34 * inch, "Shorter is faster. In blue its own time.", va="top", fontsize=9.5, color="0.3")
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color in (_OUR_COLOR, *_COLORS)]
    names = ["inductor_vision", *_FLOAT32.others]
    figure.legend(handles, names, loc="upper right", ncols=2, frameon=False, fontsize=9.5)
    note = f"Median times in float32. {'; '.join(_machines(results))}.\nAll of it: docs/benchmarks.md"
    figure.text(0.01, 0.07 * inch, note, fontsize=7, color="0.4")
    figure.tight_layout(rect=(0, 0.34 * inch, 1, 1 - 0.62 * inch), w_pad=2)
    figure.savefig(path, dpi=110, metadata={_DIGEST: digest(results), "Software": None})
    plt.close(figure)


def with_table(readme: str, results: dict[str, list[Report]]) -> str:
    """The README with its tables as the results have it.

    Raises:
        UserError: there is no place for it.
    """
    before, begin, rest = readme.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise UserError(f"the README has no place for tables, which are between {_BEGIN.strip()} and {_END.strip()}")
    return f"{before}{begin}{tables(results)}{end}{after}"


def tables(results: dict[str, list[Report]]) -> str:
    """The tables in Markdown: models, in one precision after the other, and operators."""
    models = [
        [f"{group.title}, {precision}", *_cells(group, columns)]
        for case in _TABLE_OF_MODELS
        for precision, columns in _MODELS_IN.items()
        for group in _groups([case], results, columns)
    ]
    operators = [[group.title, *_cells(group, _FLOAT32)] for group in _groups(_TABLE_OF_OPERATORS, results)]
    return "\n".join(
        _markdown(["", "this package", *columns.others], rows)
        for rows, columns in ((models, _MODELS_IN["float32"]), (operators, _FLOAT32))
        if rows
    )


def _cells(group: _Group, columns: _Columns) -> list[str]:
    others = (multiple(group.peers[title]) if title in group.peers else "-" for title in columns.others)
    return [f"{group.milliseconds} ms", *others]


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _draw_panel(axis: Any, title: str, groups: Sequence[_Group]) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    colors = dict(zip(_FLOAT32.others, _COLORS))
    highest = max([1.0, *(ratio for group in groups for ratio in group.peers.values())])
    y, ticks = 0.0, []
    for group in groups:
        first = y
        axis.barh(y, 1, height=0.9, color=_OUR_COLOR)
        axis.text(1, y, f" {group.milliseconds} ms", va="center", fontsize=8, color=_OUR_COLOR)
        for peer, ratio in group.peers.items():
            y += 1
            axis.barh(y, ratio, height=0.9, color=colors[peer])
            axis.text(ratio, y, f" {_times(ratio)}", va="center", fontsize=8)
        ticks.append(((first + y) / 2, group.title))
        y += 1.8
    axis.set_title(title, loc="left", fontsize=10.5, weight="bold")
    axis.set_yticks([at for at, _ in ticks], [name for _, name in ticks], fontsize=9.5)
    axis.set_ylim(y - 1.1, -0.8)
    if highest > 5:
        axis.set_xscale("log")
        axis.set_xlim(0.3, 2.5 * highest)
        axis.xaxis.set_major_locator(LogLocator(subs=(1,)))
        axis.xaxis.set_minor_locator(NullLocator())
    else:
        axis.set_xlim(0, 1.2 * highest)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axis.tick_params(axis="x", labelsize=8.5)
    axis.tick_params(axis="y", length=0)
    axis.axvline(1, color=_OUR_COLOR, linewidth=0.8)
    axis.grid(axis="x", color="0.92")
    axis.set_axisbelow(True)
    axis.spines[["top", "right", "left"]].set_visible(False)


def _times(ratio: float) -> str:
    return f"{significant(ratio) if ratio >= 10 else f'{ratio:.1f}' if ratio >= 2 else f'{ratio:.2f}'}x"


def _groups(
    rows: Sequence[tuple[str, str, str]], results: dict[str, list[Report]], columns: _Columns = _FLOAT32
) -> list[_Group]:
    groups = []
    for title, suite, name in rows:
        report = _latest(results, suite, name, columns)
        case = next(case for case in report.cases if case.case == name) if report else None
        ours = _ours(case, columns) if case else None
        if case and ours and ours.seconds:
            groups.append(_Group(title, ms(ours.seconds.median), _others(case, ours, columns)))
    return groups


def _ours(case: CaseResult, columns: _Columns) -> Row | None:
    return next((row for row in case.rows if row.contender in columns.ours and row.seconds), None)


def _others(case: CaseResult, ours: Row, columns: _Columns) -> dict[str, float]:
    """The multiples that are known."""
    timed = {row.contender: _ratio(row, ours) for row in case.rows if row is not ours and row.is_timed}
    known = {name: ratio for name, ratio in timed.items() if ratio is not None}
    found = {}
    for title, names in columns.others.items():
        name = next((name for name in names if name in known), None)
        if name is not None:
            found[title] = known[name]
    return found


def _ratio(row: Row, ours: Row) -> float | None:
    """The median of ratios; where these are not kept, as against most contenders, the ratio of medians."""
    ratio = row.against(ours)
    if ratio is None and row.seconds and ours.seconds:
        ratio = row.seconds.median / ours.seconds.median
    return ratio


def _latest(results: dict[str, list[Report]], suite: str, name: str, columns: _Columns = _FLOAT32) -> Report | None:
    """The run that is shown of a case: the latest in which this package was timed, with as many cases as any other of
    that date."""
    timed = [r for r in results.get(suite, ()) for case in r.cases if case.case == name and _ours(case, columns)]
    return max(timed, key=lambda r: (r.machine["date"], len(r.cases)), default=None)


def _machines(results: dict[str, list[Report]]) -> list[str]:
    cases = [(suite, name) for _, suite, name in (*_MODELS, *_OPERATORS)]
    reports = [report for suite, name in cases if (report := _latest(results, suite, name))]
    names = (
        f"{r.machine['cpu']}, {r.machine['vector_instructions']}, {r.settings['threads']} threads" for r in reports
    )
    return list(dict.fromkeys(names))
