"""Every mode of aten's sampling operators, in each dtype and memory format: which ones this package has faster.

What ``accelerate_sampling()`` leaves to Inductor follows from this table. A random sample of it takes minutes::

    python -m inductor_vision.perf.sampling_modes --operator grid_sampler_2d --sample 48

Compiling takes most of that. What Inductor has in its cache takes a moment, so that a second run, on a machine that
has nothing else to do, is mostly measuring. Each case has a process of its own: in bfloat16 and float16 aten's
gradients were seen to end theirs, by memory that was overwritten.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import multiprocessing
import random
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from .interleaving import Side, interleave
from .spec import Case, Job
from .suites import grid_sampler_2d, upsample2d

_DTYPES = torch.float32, torch.float64, torch.bfloat16, torch.float16
_SIZES = {3: 256, 16: 128, 64: 64}  # height and width by channels


def _samplings() -> Iterator[grid_sampler_2d.Sampling]:
    modes = itertools.product(range(3), range(3), (False, True))
    for mode, dtype, last, channels, backward in itertools.product(
        modes, _DTYPES, (False, True), _SIZES, (False, True)
    ):
        size = _SIZES[channels]
        yield grid_sampler_2d.Sampling(
            channels, (size, size), modes=mode, dtype=dtype, channels_last=last, backward=backward
        )


def _resizings() -> Iterator[upsample2d.Resize]:
    for mode, dtype, last, channels, larger in itertools.product(
        ("bilinear", "bicubic"), _DTYPES, (False, True), _SIZES, (True, False)
    ):
        size, other = _SIZES[channels], _SIZES[channels] * 2 if larger else _SIZES[channels] * 5 // 8
        yield upsample2d.Resize(channels, (size, size), (other, other), (0, 0), dtype, last, mode)


_MATRICES = {
    "grid_sampler_2d": (grid_sampler_2d.SUITE, _samplings),
    "upsample2d": (upsample2d.SUITE, _resizings),
}
_CONTENDERS = "ours-compiled", "eager", "stock-compiled"


def chosen(problems: Sequence[Any], count: int | None, seed: int = 0) -> list[Any]:
    """A random sample, always the same; all, if ``count`` is None."""
    if count is None or count >= len(problems):
        return list(problems)
    return random.Random(seed).sample(list(problems), count)


def _measure(operator: str, problem: Any, threads: int, seconds: float, names: Sequence[str]) -> dict[str, float]:
    """Milliseconds of each contender."""
    torch.set_num_threads(threads)
    suite, _ = _MATRICES[operator]
    job = Job(Case(operator, str(problem), lambda: problem, 1.0), problem, threads)
    sides = [Side.of(one.name, threads, one.prepare(job)) for one in suite.contenders if one.name in names]
    interleave(sides, seconds, lambda said: None)
    return {side.name: 1e3 * statistics.median(side.times.values()) for side in sides}


def _apart(*arguments: Any) -> Any:
    """The same in a process of its own, which has this one's imports; None if it ends otherwise than by returning."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()

    def run() -> None:
        there.send(_measure(*arguments))

    process = context.Process(target=run)
    process.start()
    there.close()
    times = None
    with contextlib.suppress(EOFError):
        times = here.recv()
    process.join()
    return times


def _row(operator: str, problem: Any, threads: int, seconds: float) -> str:
    times = _apart(operator, problem, threads, seconds, _CONTENDERS)
    if times is None:  # one of them ends the process: each by itself
        alone = (_apart(operator, problem, threads, seconds / len(_CONTENDERS), [name]) for name in _CONTENDERS)
        times = {name: time for measured in alone for name, time in (measured or {}).items()}
    others = [time for name, time in times.items() if name != _CONTENDERS[0]]
    ratio = f"{min(others) / times[_CONTENDERS[0]]:.2f}" if others and _CONTENDERS[0] in times else "-"
    shown = [f"{times[name]:.3g}" if name in times else "ends the process" for name in _CONTENDERS]
    return f"| {problem} | {' | '.join(shown)} | {ratio} |"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m inductor_vision.perf.sampling_modes", description=__doc__)
    parser.add_argument("--operator", choices=list(_MATRICES), required=True)
    parser.add_argument("--sample", type=int, help="how many cases, by chance; all, if it is not given")
    parser.add_argument("--match", default="", help="only cases in whose description these words are, by commas")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=0.5, help="of measuring for each case")
    options = parser.parse_args(arguments)
    _, make = _MATRICES[options.operator]
    words = [word.strip() for word in options.match.split(",") if word.strip()]
    problems = [problem for problem in make() if all(word in str(problem).split(", ") for word in words)]
    importlib.import_module("torch._inductor.compile_fx")  # so that each process has it

    print("| case | " + " | ".join(f"{name}, ms" for name in _CONTENDERS) + " | best of the others / ours |")
    print("|---|" + "--:|" * (len(_CONTENDERS) + 1))
    for problem in chosen(problems, options.sample):
        print(_row(options.operator, problem, options.threads, options.seconds), flush=True)


if __name__ == "__main__":
    main()
