"""A small network of deformable convolutions over a photograph: eagerly, compiled, and as a package on disk.

    python examples/demo.py [--photo china.jpg | flower.jpg | FILE] [--out out]

Prints how long each takes, its speed-up, its largest error, and the path that every deformable convolution took; draws
where the last one sampled the photograph (out/demo.png); leaves the package behind (out/demo.pt2).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import pathlib
import statistics
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator

import inductor_vision
import matplotlib
import numpy as np
import torch
from inductor_vision.paths import Path, recorded_paths
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import Tensor, nn

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.collections import LineCollection

# torch speaks of its own internals, and of the cache that is left out below.
warnings.filterwarnings("ignore", message=".*(LeafSpec|force_disable_caches)")

SPREAD = 1.0  # standard deviation of the offsets, in pixels of the feature map
POINTS = ((0.16, 0.30), (0.34, 0.72), (0.50, 0.42), (0.62, 0.80), (0.80, 0.62), (0.88, 0.26))  # (x, y) to look at
COLOURS = ("#e6194b", "#ffe119", "#42d4f4", "#f58231", "#3cdc4b", "#f032e6")


class DeformableBlock(nn.Module):
    """relu(batch_norm(deform_conv2d(x))), plus x where shapes allow; offsets and mask come from a convolution of x."""

    def __init__(self, channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.where = nn.Conv2d(channels, 3 * 9, 3, stride, padding=1)  # (y, x) and mask for each of the 3x3 taps
        self.convolve = inductor_vision.DeformConv2d(channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels, momentum=None)
        self.residual = stride == 1 and channels == out_channels
        nn.init.normal_(self.where.weight[:18], std=SPREAD / (9 * channels / 2) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        offset, mask = self.where(x).split([18, 9], dim=1)
        y = self.norm(self.convolve(x, offset, mask.sigmoid()))
        return torch.relu(x + y if self.residual else y)


def network() -> nn.Sequential:
    """A stem and four deformable convolutions, down to an eighth of the photograph's size; random weights."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 32, 7, 2, padding=3, bias=False), nn.BatchNorm2d(32, momentum=None), nn.ReLU()),
        DeformableBlock(32, 64, stride=2),
        DeformableBlock(64, 64),
        DeformableBlock(64, 128, stride=2),
        DeformableBlock(128, 128),
    )


def load_photograph(name: str) -> np.ndarray:
    """One of scikit-learn's photographs, or a file. [H, W, 3], bytes."""
    if name in ("china.jpg", "flower.jpg"):
        return load_sample_image(name)
    return np.asarray(Image.open(name).convert("RGB"))


def as_input(photograph: np.ndarray) -> Tensor:
    return torch.from_numpy(photograph.copy()).permute(2, 0, 1)[None].float().contiguous() / 127.5 - 1


@contextlib.contextmanager
def progress(what: str) -> Iterator[None]:
    """Show that something is going on, with the seconds it has taken so far."""
    start, done = time.perf_counter(), threading.Event()
    terminal = sys.stdout.isatty()

    def line() -> str:
        return f"{what} ... {time.perf_counter() - start:.0f} s"

    def tick() -> None:
        while not done.wait(0.5 if terminal else 10):
            print(f"\r{line()}" if terminal else line(), end="" if terminal else "\n", flush=True)

    ticker = threading.Thread(target=tick, daemon=True)
    ticker.start()
    try:
        yield
    finally:
        done.set()
        ticker.join()
        print(f"\r{line()}" if terminal else line(), flush=True)


@dataclasses.dataclass
class Side:
    """One way to run the network, and what came of it."""

    name: str
    run: Callable[[Tensor], Tensor]
    paths: list[Path]
    error: float = 0.0
    milliseconds: float = 0.0


def build_sides(model: nn.Module, image: Tensor, package: pathlib.Path) -> list[Side]:
    """Run, compile, and export and load back; with the path that each operator call took."""
    with progress("eager: first run"), recorded_paths() as eager_paths:
        model(image)

    compiled = torch.compile(model)
    # Weights are constants, as in a package. An answer from Inductor's cache would tell no paths.
    with (
        progress("torch.compile: compiling"),
        recorded_paths() as compiled_paths,
        torch._inductor.config.patch(freezing=True, force_disable_caches=True),
    ):
        compiled(image)

    with progress("AOTInductor: exporting and compiling"), recorded_paths() as package_paths:
        exported = torch.export.export(model, (image,))
        torch._inductor.aoti_compile_and_package(exported, package_path=str(package))
    loaded = torch._inductor.aoti_load_package(str(package))
    return [
        Side("eager", model, eager_paths),
        Side("torch.compile", compiled, compiled_paths),
        Side("AOTInductor", loaded, package_paths),
    ]


def measure(sides: list[Side], model: nn.Module, image: Tensor, rounds: int = 5) -> None:
    """Fill in times, sides taking turns, and errors: relative to the largest value, against eager mode in float64."""
    exact = model.double()(image.double())
    model.float()
    for side in sides:
        side.error = ((side.run(image) - exact).abs().max() / exact.abs().max()).item()
    times: dict[str, list[float]] = {side.name: [] for side in sides}
    for _ in range(rounds):
        for side in sides:
            start = time.perf_counter()
            side.run(image)
            times[side.name].append(1e3 * (time.perf_counter() - start))
    for side in sides:
        side.milliseconds = statistics.median(times[side.name])


def print_table(sides: list[Side]) -> None:
    print(f"\n{'':14} {'time':>10} {'speed-up':>9} {'largest error':>14}")
    for side in sides:
        speedup = sides[0].milliseconds / side.milliseconds
        print(f"{side.name:14} {side.milliseconds:7.1f} ms {speedup:8.1f}x {side.error:14.1e}")
    print("(errors: relative to the largest value, against eager mode in float64)")
    print("\npaths of the deformable convolutions:")
    for side in sides:
        for path, count in Counter(f"{path.kind}, {path.detail}" for path in side.paths).items():
            print(f"{side.name:14} {count}x {path}")


@dataclasses.dataclass(frozen=True)
class Samples:
    """Where the nine taps of one output pixel sample, in pixels of the photograph, and the mask they are scaled by."""

    undisplaced: np.ndarray  # [9, 2], (x, y)
    displaced: np.ndarray  # [9, 2]
    mask: np.ndarray  # [9]


def sample_places(model: nn.Sequential, image: Tensor) -> list[Samples]:
    """What the last block does at POINTS."""
    block, features = model[-1], model[:-1](image)
    offset, mask = block.where(features)[0].split([18, 9])
    height, width = features.shape[2:]
    scale = np.array([image.shape[3] / width, image.shape[2] / height])
    taps = np.array([(x, y) for y in (-1, 0, 1) for x in (-1, 0, 1)])
    samples = []
    for x, y in POINTS:
        column, row = round(x * (width - 1)), round(y * (height - 1))
        undisplaced = np.array([column, row]) + taps
        moves = offset[:, row, column].reshape(9, 2).flip(1).numpy()  # (y, x) to (x, y)
        to_photograph = [(place + 0.5) * scale - 0.5 for place in (undisplaced, undisplaced + moves)]
        samples.append(Samples(*to_photograph, mask[:, row, column].sigmoid().numpy()))
    return samples


def draw_samples(axes: plt.Axes, samples: Samples, colour: str, size: float) -> None:
    lines = np.stack([samples.undisplaced, samples.displaced], axis=1)
    width = size**0.5 / 5
    axes.add_collection(LineCollection(lines, colors="black", linewidths=width + 1.2, alpha=0.5))
    axes.add_collection(LineCollection(lines, colors=colour, linewidths=width))
    squares = {"s": size, "marker": "s", "facecolors": "none"}
    axes.scatter(*samples.undisplaced.T, **squares, edgecolors="black", linewidths=width + 1.6)
    axes.scatter(*samples.undisplaced.T, **squares, edgecolors="white", linewidths=width)
    dots = {"s": 4 * size * samples.mask, "edgecolors": "black", "linewidths": 0.8, "zorder": 3}
    axes.scatter(*samples.displaced.T, color=colour, **dots)


def draw(photograph: np.ndarray, samples: list[Samples], path: pathlib.Path) -> None:
    """The photograph with all places, and each output pixel's neighbourhood enlarged below."""
    figure = plt.figure(figsize=(12, 10.7), layout="constrained")
    grid = figure.add_gridspec(2, len(samples), height_ratios=(4.1, 1))
    whole = figure.add_subplot(grid[0, :])
    whole.imshow(photograph)
    whole.axis("off")
    title = f"Where a deformable convolution samples the photograph, for {len(samples)} of its output pixels"
    whole.set_title(title, fontsize=16, pad=12)
    reach = np.quantile([np.abs(s.displaced - s.undisplaced[4]).max() for s in samples], 0.8) + 6
    for index, (place, colour) in enumerate(zip(samples, COLOURS)):
        draw_samples(whole, place, colour, size=10)
        x, y = place.undisplaced[4]
        box = plt.Rectangle((x - reach, y - reach), 2 * reach, 2 * reach, fill=False, edgecolor=colour, linewidth=2)
        whole.add_patch(box)
        detail = figure.add_subplot(grid[1, index])
        detail.imshow(photograph, alpha=0.7)
        draw_samples(detail, place, colour, size=32)
        detail.set(xlim=(x - reach, x + reach), ylim=(y + reach, y - reach), xticks=[], yticks=[])
        detail.spines[:].set(color=colour, linewidth=3)
    marks = [
        plt.Line2D([], [], color="none", marker="s", markerfacecolor="white", markeredgecolor="black"),
        plt.Line2D([], [], color="none", marker="o", markerfacecolor="grey", markeredgecolor="black", markersize=10),
    ]
    labels = ["plain 3x3 convolution", "deformable convolution (the larger the dot, the greater its mask)"]
    figure.legend(marks, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=13)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photo", default="china.jpg", help="china.jpg, flower.jpg or a file (default: %(default)s)")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"), help="folder (default: %(default)s)")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    picture, package = arguments.out / "demo.png", arguments.out / "demo.pt2"

    photograph = load_photograph(arguments.photo)
    image, model = as_input(photograph), network()
    size = f"{photograph.shape[1]}x{photograph.shape[0]}"
    print(
        f"photograph {arguments.photo}, {size}; float32, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    with torch.no_grad():
        model(image)  # in training mode: the photograph's own statistics for batch norm
        model.eval()
        sides = build_sides(model, image, package)
        with progress("measuring"):
            measure(sides, model, image)
        print_table(sides)
        draw(photograph, sample_places(model, image), picture)
    print(f"\nwrote {picture} and {package} ({package.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
