"""Train a network of deformable convolutions on warped digits, and one of ordinary convolutions beside it.

    python examples/train.py [--epochs 60] [--ops inductor_vision | torchvision] [--eager] [--out out]

The digits are scikit-learn's, rotated, scaled, sheared, moved and bent: anew in every epoch for training, once and for
all for testing. Both networks have three convolutions of 3x3, a pooling and a linear layer, and see the same pictures
in the same order, with the same optimizer. The last two convolutions of one are DCNv2
(https://arxiv.org/abs/1811.11168); those of the other are ordinary and wider, so that both networks have about as many
parameters. What differs too: plain ones have one learning rate, those that predict offsets and masks learn slower, as
in the papers. Prints parameters, accuracy and times of the two; draws their losses, and where the trained deformable
layers sample some of the test digits (out/train.png).

``--ops torchvision`` takes torchvision's operator for comparison: its kernels as they are, also in a compiled network.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import inductor_vision
import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from inductor_vision.perf.progress import Progress
from sklearn.datasets import load_digits
from torch import Tensor, nn

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullLocator

EPOCHS = 60
BATCH = 64
LEARNING_RATE = 0.02
OFFSETS_LEARN_SLOWER = 0.1  # a factor, for the convolutions that predict offsets and masks
SIZE = 24  # of a picture, in pixels; the digits come with 8
TEST_DIGITS, TEST_WARPS = 360, 4  # digits for testing, and how often each is warped
WIDTHS = {"plain": (16, 32, 36), "deformable": (16, 16, 32)}  # as many parameters, within 3 %
COLOURS = {"plain": "#8a8f98", "deformable": "#d6336c"}
DRAWN = (3, 5, 2)  # digits to look at


class DeformableConvolution(nn.Module):
    """DCNv2: a 3x3 convolution whose samples are moved and scaled by what another convolution says."""

    def __init__(self, channels: int, out_channels: int, stride: int, deform_conv: type[nn.Module]) -> None:
        super().__init__()
        self.where = nn.Conv2d(channels, 3 * 9, 3, stride, padding=1)  # (y, x) and mask for each of the 3x3 taps
        self.convolve = deform_conv(channels, out_channels, 3, stride, padding=1, bias=False)
        # Training begins with an ordinary convolution: nothing is moved, and every mask is sigmoid(0) = 1/2.
        nn.init.zeros_(self.where.weight)
        nn.init.zeros_(self.where.bias)

    def offset_and_mask(self, x: Tensor) -> tuple[Tensor, Tensor]:
        offset, mask = self.where(x).split([18, 9], dim=1)
        return offset, mask.sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return self.convolve(x, *self.offset_and_mask(x))


def make_network(kind: str, deform_conv: type[nn.Module] = inductor_vision.DeformConv2d) -> nn.Sequential:
    """A ``"plain"`` or a ``"deformable"`` network for pictures [B, 1, SIZE, SIZE]; its result is [B, 10]."""
    torch.manual_seed(0)

    def finished(convolution: nn.Module, channels: int) -> nn.Sequential:
        return nn.Sequential(convolution, nn.BatchNorm2d(channels), nn.ReLU())

    def convolution(channels: int, out_channels: int, stride: int) -> nn.Module:
        if kind == "plain":
            return nn.Conv2d(channels, out_channels, 3, stride, padding=1, bias=False)
        return DeformableConvolution(channels, out_channels, stride, deform_conv)

    first, second, third = WIDTHS[kind]
    return nn.Sequential(
        finished(nn.Conv2d(1, first, 3, stride=2, padding=1, bias=False), first),
        finished(convolution(first, second, stride=1), second),
        finished(convolution(second, third, stride=2), third),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(third, 10),
    )


def make_optimizer(network: nn.Module) -> torch.optim.Optimizer:
    slow = [value for name, value in network.named_parameters() if ".where." in name]
    others = [value for name, value in network.named_parameters() if ".where." not in name]
    groups = [{"params": others}, {"params": slow, "lr": OFFSETS_LEARN_SLOWER * LEARNING_RATE}]
    # Fused: one kernel for all parameters, so that there is nothing left to compile.
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=LEARNING_RATE, fused=True)


def training_step(network: nn.Module, optimizer: torch.optim.Optimizer, pictures: Tensor, labels: Tensor) -> Tensor:
    """Forward, backward, and a step of the optimizer; the loss. ``torch.compile`` takes the network or all of it."""
    optimizer.zero_grad()
    loss = F.cross_entropy(network(pictures), labels)
    loss.backward()
    optimizer.step()
    return loss.detach()


def warp(digits: Tensor, random: torch.Generator) -> Tensor:
    """Rotated, scaled, sheared, moved and bent. [B, 1, 8, 8] to [B, 1, SIZE, SIZE]"""
    count = len(digits)

    def between(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=random)

    angle, shear = between(-0.7, 0.7), between(-0.3, 0.3)
    scale = between(math.log(0.4), math.log(0.95)).exp()  # of the digit, relative to the picture
    stretch = between(-0.2, 0.2).exp()
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros(count)
    rotate = torch.stack([cos, -sin, sin, cos], dim=1).view(count, 2, 2)
    skew = torch.stack([stretch, shear, zero, 1 / stretch], dim=1).view(count, 2, 2)
    centre = between(-0.8, 0.8, 1, 1, 2) * (1 - scale[:, None, None, None])
    bend = 0.13 * torch.randn(count, 2, 4, 4, generator=random)

    # Where each pixel of the picture lies on the digit; the edges of both are at -1 and 1.
    here = F.affine_grid(torch.eye(2, 3).expand(count, 2, 3), [count, 1, SIZE, SIZE], align_corners=False)
    there = (here - centre).flatten(1, 2) @ (rotate @ skew / scale[:, None, None]).mT
    there = there.view_as(here) + F.interpolate(bend, (SIZE, SIZE), mode="bicubic").movedim(1, 3)
    return F.grid_sample(digits, there, mode="bicubic", align_corners=False).clamp(0, 1)


@dataclasses.dataclass(frozen=True)
class Data:
    digits: Tensor  # [B, 1, 8, 8], not warped yet
    labels: Tensor  # [B]
    test_pictures: list[Tensor]  # TEST_WARPS of [TEST_DIGITS, 1, SIZE, SIZE], the same digits in each
    test_labels: Tensor  # [TEST_DIGITS]

    def batches(self, random: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """An epoch of pictures and labels, warped and shuffled anew; what is left for less than a batch is left out."""
        pictures, order = warp(self.digits, random), torch.randperm(len(self.digits), generator=random)
        for chosen in order.split(BATCH)[: len(order) // BATCH]:
            yield pictures[chosen], self.labels[chosen]


def load_data() -> Data:
    """The last digits are for testing, the others for training."""
    loaded = load_digits()
    digits = torch.from_numpy(loaded.images).float()[:, None] / 16
    labels = torch.from_numpy(loaded.target).long()
    random = torch.Generator().manual_seed(0)
    tests = [warp(digits[-TEST_DIGITS:], random) for _ in range(TEST_WARPS)]
    return Data(digits[:-TEST_DIGITS], labels[:-TEST_DIGITS], tests, labels[-TEST_DIGITS:])


@dataclasses.dataclass
class Course:
    """How a training went."""

    compile_seconds: float = 0.0  # what the first evaluation and the first step took
    epoch_seconds: list[float] = dataclasses.field(default_factory=list)
    step_seconds: list[float] = dataclasses.field(default_factory=list)
    train_losses: list[float] = dataclasses.field(default_factory=list)  # means over each epoch
    test_losses: list[float] = dataclasses.field(default_factory=list)  # before the first epoch, and after each
    accuracy: float = 0.0  # in testing, after the last epoch


@torch.no_grad()
def evaluate(network: nn.Module, data: Data) -> tuple[float, float]:
    """Loss and accuracy in testing."""
    network.eval()
    results = torch.cat([network(pictures) for pictures in data.test_pictures])
    network.train()
    labels = data.test_labels.repeat(TEST_WARPS)
    return F.cross_entropy(results, labels).item(), (results.argmax(1) == labels).float().mean().item()


def train(network: nn.Module, data: Data, epochs: int, say: Callable[..., None]) -> Course:
    course, optimizer, random = Course(), make_optimizer(network), torch.Generator().manual_seed(1)
    steps = epochs * (len(data.digits) // BATCH)
    rates = [group["lr"] for group in optimizer.param_groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=steps + 1)

    say("first evaluation and first step: compiling happens here")
    start = time.perf_counter()
    course.test_losses.append(evaluate(network, data)[0])
    course.compile_seconds = time.perf_counter() - start
    for epoch in range(epochs):
        epoch_start, losses, spent = time.perf_counter(), [], 0.0
        for pictures, labels in data.batches(random):
            start = time.perf_counter()
            losses.append(training_step(network, optimizer, pictures, labels).item())
            seconds = time.perf_counter() - start
            schedule.step()
            if epoch == 0 and len(losses) == 1:
                course.compile_seconds += seconds
                spent = seconds
            else:
                course.step_seconds.append(seconds)
            done = len(course.step_seconds) + 1
            bar = ("#" * round(30 * done / steps)).ljust(30, ".")
            say(f"[{bar}] epoch {epoch + 1} of {epochs}, loss {losses[-1]:.2f}", passing=True)
        course.epoch_seconds.append(time.perf_counter() - epoch_start - spent)
        course.train_losses.append(statistics.mean(losses))
        loss, course.accuracy = evaluate(network, data)
        course.test_losses.append(loss)
        after = f"epoch {epoch + 1} of {epochs}: loss {course.train_losses[-1]:.3f}, in testing {loss:.3f}"
        say(f"{after}, accuracy {100 * course.accuracy:.1f} %")
    return course


def print_table(networks: dict[str, nn.Module], courses: dict[str, Course], compiled: bool) -> None:
    print(f"{'network':12} {'parameters':>10} {'test accuracy':>14} {'step':>10} {'epoch':>8} {'compile':>9}")
    for kind, course in courses.items():
        parameters = sum(value.numel() for value in networks[kind].parameters())
        compiling = f"{course.compile_seconds:7.1f} s" if compiled else "-"
        print(
            f"{kind:12} {parameters:10,} {100 * course.accuracy:12.1f} % "
            f"{1e3 * statistics.median(course.step_seconds):7.1f} ms "
            f"{statistics.median(course.epoch_seconds):6.2f} s {compiling:>9}"
        )
    print("(step, epoch: medians; compile: the first evaluation and step, less where Inductor has them in its cache)")


@torch.no_grad()
def samples(network: nn.Sequential, picture: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """Where both deformable layers together sample ``picture`` for one output pixel, ``place``: (y, x) in pixels of the
    picture, [81, 2], and the products of their masks, [81]."""
    stem, lower, upper = network[0], network[1], network[2]
    taps = torch.cartesian_prod(*2 * [torch.arange(-1.0, 2.0)])  # [9, 2]
    inputs = {lower: stem(picture[None])}
    inputs[upper] = lower(inputs[lower])

    points, masks = place[None].float(), torch.ones(1)
    for layer in (upper, lower):
        stride = layer[0].convolve.stride[0]
        said = torch.cat(layer[0].offset_and_mask(inputs[layer]), dim=1)
        # Between output pixels, what a layer would do is interpolated.
        size = torch.tensor(said.shape[2:])
        grid = (2 * points / (size - 1) - 1).flip(1)[None, None]  # (x, y) in -1 .. 1
        said = F.grid_sample(said, grid, padding_mode="border", align_corners=True)[0, :, 0].T  # [N, 27]
        moves = said[:, :18].reshape(-1, 9, 2)
        points = (stride * points[:, None] + taps + moves).flatten(0, 1)
        masks = (masks[:, None] * said[:, 18:]).flatten()
    return stem[0].stride[0] * points, masks


def stroke_place(picture: Tensor, size: int) -> Tensor:
    """The pixel (y, x) of a map of size x size that lies on a stroke, near the middle of the digit."""
    every = SIZE // size
    ink = picture[0, ::every, ::every]
    places = torch.cartesian_prod(*2 * [torch.arange(float(size))])
    middle = (places * ink.flatten()[:, None]).sum(0) / ink.sum()
    return places[(ink.flatten() - 0.3 * (places - middle).norm(dim=1)).argmax()]


def draw(network: nn.Sequential, courses: dict[str, Course], data: Data, path: pathlib.Path) -> None:
    """Losses on the left; on the right some test digits, each in all of its warps, and samples of one output pixel."""
    figure = plt.figure(figsize=(15, 7.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.5))
    axes = left.subplots()
    for kind, course in courses.items():
        colour, epochs = COLOURS[kind], len(course.train_losses)
        axes.plot(range(epochs + 1), course.test_losses, color=colour, linewidth=2.2, label=f"{kind}, test")
        axes.plot(
            np.arange(epochs) + 0.5, course.train_losses, ":", color=colour, linewidth=2, label=f"{kind}, training"
        )
    axes.set(xlabel="epoch", ylabel="cross entropy", yscale="log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=12)
    axes.set_title("Loss", fontsize=14)

    network.eval()
    grid = right.subplots(len(DRAWN), TEST_WARPS)
    for row, digit in zip(grid, DRAWN):
        index = (data.test_labels == digit).nonzero()[0].item()
        for axes, pictures in zip(row, data.test_pictures):
            draw_samples(axes, network, pictures[index])
    handles, labels = grid[0, 0].get_legend_handles_labels()
    right.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=12)
    right.suptitle("Samples that two deformable layers take for one output pixel", fontsize=14)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_samples(axes: plt.Axes, network: nn.Sequential, picture: Tensor) -> None:
    place = stroke_place(picture, size=SIZE // 4)
    before, _ = samples(make_network("deformable").eval(), picture, place)
    after, masks = samples(network, picture, place)
    axes.imshow(picture[0], cmap="gray_r", vmin=0, vmax=1.8, interpolation="bicubic")
    squares = {"marker": "s", "s": 9, "facecolors": "none", "edgecolors": "#4c93d0", "linewidths": 0.7}
    axes.scatter(*before.flip(1).T, **squares, label="before training")
    dots = {"color": COLOURS["deformable"], "alpha": 0.6, "linewidths": 0}
    axes.scatter(
        *after.flip(1).T, s=80 * masks / masks.max(), **dots, label="trained (the larger, the greater its mask)"
    )
    plus = {"marker": "P", "s": 90, "color": "#ffd43b", "edgecolors": "black", "linewidths": 0.8, "zorder": 3}
    axes.scatter(*4 * place.flip(0)[:, None], **plus, label="output pixel")
    axes.set(xlim=(-0.5, SIZE - 0.5), ylim=(SIZE - 0.5, -0.5), xticks=[], yticks=[])
    axes.spines[:].set_color("#ced4da")


def deformable_class(ops: str) -> type[nn.Module]:
    if ops == "inductor_vision":
        return inductor_vision.DeformConv2d
    try:
        from torchvision.ops import DeformConv2d
    except (ImportError, RuntimeError) as error:  # the latter where its library does not go with torch's
        sys.exit(f"--ops torchvision: torchvision cannot be imported ({error})")
    return DeformConv2d


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="(default: %(default)s)")
    operators = ("inductor_vision", "torchvision")
    parser.add_argument("--ops", choices=operators, default=operators[0], help="whose deformable convolution it is")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"), help="folder (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.epochs < 1:
        parser.error("--epochs must be at least 1")
    deform_conv = deformable_class(arguments.ops)
    arguments.out.mkdir(parents=True, exist_ok=True)
    picture = arguments.out / "train.png"

    data, progress = load_data(), Progress()
    how = "eager" if arguments.eager else "compiled"
    print(f"operators of {arguments.ops}, {how}; {torch.get_num_threads()} threads, torch {torch.__version__}")
    networks = {kind: make_network(kind, deform_conv) for kind in WIDTHS}
    courses = {}
    for kind, network in networks.items():
        # Training and testing have a batch size each, and a graph made for it.
        run = network if arguments.eager else torch.compile(network, fullgraph=True, dynamic=False)
        courses[kind] = train(run, data, arguments.epochs, progress.part(kind).say)
    progress.done()
    print_table(networks, courses, compiled=not arguments.eager)
    draw(networks["deformable"], courses, data, picture)
    print(f"wrote {picture}")


if __name__ == "__main__":
    main()
