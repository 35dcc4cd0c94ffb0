"""``python -m inductor_vision.perf.convolution_costs``: measure and fit what decides between kernels for convolutions.

It times oneDNN's convolution and ``winograd_conv2d``, with weights as they are under freezing, all channels_last, and
prints the rates with which ``lowering/passes/convolution_kernels.py`` estimates these times best.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..integrations.models import freeze_weights
from ..lowering.common.constants import kept_small
from ..lowering.passes.convolution_kernels import Convolution, Work, library_work, winograd_work
from ..ops.winograd_conv2d import ALGORITHMS, winograd_conv2d
from .backends import Holding
from .machine import describe_machine

_PUBLISHED = "3,64 16,16 32,32 64,64 64,128 128,128 256,256 256,512 512,512"
_SIZES = ((7, 7), (14, 14), (28, 28), (25, 34), (56, 56), (100, 136), (200, 272), (224, 224))
_BATCHED, _BATCH = 28, 8  # maps of up to this side are measured in batches of this size, too
_MOST = 33e9  # multiplications of a problem
_SECONDS = 0.1  # for each


def _problems(channels: int, out_channels: int) -> Iterator[Convolution]:
    for size in _SIZES:
        for batch in (1, _BATCH) if size[0] <= _BATCHED else (1,):
            problem = Convolution(batch, channels, out_channels, size, threads=1)
            if library_work(problem).multiplications <= _MOST:
                yield problem


def _onednn(problem: Convolution) -> Callable[[Tensor], Tensor]:
    """What Inductor calls under freezing."""
    weight, bias = torch.randn(problem.out_channels, problem.channels, 3, 3), torch.randn(problem.out_channels)
    geometry = [1, 1], [1, 1], [1, 1], 1
    size = [problem.batch, problem.channels, *problem.size]
    packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *geometry, size)
    return lambda x: torch.ops.mkldnn._convolution_pointwise(x, packed, bias, *geometry, "none", [], "")


def _winograd(channels: int, out_channels: int, tile: int, transforming: bool) -> Callable[[Tensor], Tensor]:
    """Compiled for any size, with a constant weight that is transformed in each call, or as the operator decides."""
    weight, bias = torch.randn(out_channels, channels, 3, 3), torch.randn(out_channels)
    example = torch.randn(2, channels, 9, 11).contiguous(memory_format=torch.channels_last)
    module = Holding(winograd_conv2d, [example, weight, bias, 1, tile], held=(1, 2))
    torch._dynamo.reset()
    compiled = torch.compile(module.eval(), dynamic=True)

    def call(x: Tensor) -> Tensor:
        with kept_small() if transforming else contextlib.nullcontext():  # it may compile, as for a batch of one image
            return compiled(x)

    call(example)
    return call


def _time(kernels: dict[str, Callable[[Tensor], Any]], x: Tensor) -> dict[str, float]:
    """The medians of calls in turn."""
    times: dict[str, list[float]] = {name: [] for name in kernels}
    for kernel in kernels.values():
        kernel(x)
    end = time.perf_counter() + _SECONDS * len(kernels)
    while time.perf_counter() < end or len(times["onednn"]) < 3:
        for name, kernel in kernels.items():
            start = time.perf_counter()
            kernel(x)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(of_one) for name, of_one in times.items()}


# Each kernel is compiled once more for each number of threads, all from one function.
_RECOMPILING = {"recompile_limit": 1000, "fail_on_recompile_limit_hit": True}


@torch.no_grad()
def measure(
    channels: Sequence[tuple[int, int]], tiles: Sequence[int], threads: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """A row for each problem and number of threads."""
    import torch._dynamo

    freeze_weights()
    for pair in channels:
        kernels = {
            f"winograd-{tile}" + "-transforming" * transforming: _winograd(*pair, tile, transforming)
            for tile in tiles
            for transforming in (False, True)
        }
        for problem in _problems(*pair):
            x = torch.randn(problem.batch, problem.channels, *problem.size)
            x = x.contiguous(memory_format=torch.channels_last)
            for number in threads:
                torch.set_num_threads(number)
                with torch._dynamo.config.patch(_RECOMPILING):
                    seconds = _time({"onednn": _onednn(problem), **kernels}, x)
                yield {"shape": [problem.batch, *pair, *problem.size], "threads": number, "seconds": seconds}


def work_of(row: dict[str, Any], kernel: str) -> Work:
    """What a kernel did in a row of measurements."""
    (batch, channels, out_channels, *size), threads = row["shape"], row["threads"]
    constant = not kernel.endswith("-transforming")
    problem = Convolution(batch, channels, out_channels, tuple(size), constant=constant, threads=threads)
    return library_work(problem) if kernel == "onednn" else winograd_work(problem, int(kernel.split("-")[1]))


def fit(rows: Sequence[dict[str, Any]], kernels: Sequence[str]) -> Work:
    """The rates, none of which is negative, whose relative errors have the least sum of squares."""
    samples = [(work_of(row, kernel), row["seconds"][kernel]) for row in rows for kernel in kernels]
    work = torch.tensor([[amount / seconds for amount in work] for work, seconds in samples], dtype=torch.float64)
    scale = work.abs().amax(0).clamp(min=1e-30)
    rates = torch.zeros(work.shape[1], dtype=torch.float64)
    used = [i for i in range(work.shape[1]) if work[:, i].any()]
    while used:
        solution = torch.linalg.lstsq((work / scale)[:, used], torch.ones(len(work), 1, dtype=torch.float64)).solution
        rates.zero_()
        rates[used] = solution[:, 0]
        if rates.min() >= 0:
            break
        used.remove(int(rates.argmin()))
    return Work(*(rates / scale).tolist())


def _report(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    groups = {
        "LIBRARY_RATES": ["onednn"],
        "WINOGRAD_RATES": sorted({k for row in rows for k in row["seconds"]} - {"onednn"}),
    }
    rates = {name: fit(rows, kernels) for name, kernels in groups.items()}
    for name, kernels in groups.items():
        errors = [
            math.log(work_of(row, kernel).seconds(rates[name]) / row["seconds"][kernel])
            for row in rows
            for kernel in kernels
        ]
        yield f"{name}: {rates[name]}, off by {math.exp(statistics.fmean(map(abs, errors))):.2f}x on average"
    for row in rows:
        usual = row["seconds"]["onednn"]
        texts = [f"{row['shape']}, {row['threads']} threads: {1e3 * usual:.3f} ms"]
        for kernel in groups["WINOGRAD_RATES"]:
            estimate = work_of(row, kernel).seconds(rates["WINOGRAD_RATES"]) / work_of(row, "onednn").seconds(
                rates["LIBRARY_RATES"]
            )
            texts.append(f"{kernel} {row['seconds'][kernel] / usual:.2f} (estimated {estimate:.2f})")
        yield ", ".join(texts)


def main() -> None:
    """Measure, or read what was measured, and print."""
    parser = argparse.ArgumentParser(prog="python -m inductor_vision.perf.convolution_costs", description=__doc__)
    parser.add_argument("file", type=Path, help="measurements, to which new ones are added")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, torch.get_num_threads()])
    parser.add_argument("--tiles", type=int, nargs="+", default=list(ALGORITHMS))
    parser.add_argument(
        "--channels", nargs="*", metavar="IN,OUT", help=f"measure these; the published ones: {_PUBLISHED}"
    )
    options = parser.parse_args()
    file = json.loads(options.file.read_text()) if options.file.exists() else {"rows": []}
    if options.channels:
        pairs = [tuple(map(int, pair.split(","))) for pair in options.channels]
        kept = [row for row in file["rows"] if tuple(row["shape"][1:3]) not in pairs]
        file = {"machine": describe_machine(), "rows": [*kept, *measure(pairs, options.tiles, options.threads)]}
        rows = ",\n".join(map(json.dumps, file["rows"]))
        options.file.write_text(f'{{"machine": {json.dumps(file["machine"])}, "rows": [\n{rows}\n]}}\n')
    if file["rows"]:
        print("\n".join(_report(file["rows"])))


if __name__ == "__main__":
    main()
