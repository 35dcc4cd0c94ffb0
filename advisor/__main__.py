"""``python -m inductor_vision.advisor``: measure what makes the convolutions of a model of yours faster here."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from ..perf.options import check_outputs, positive
from ..perf.progress import Progress
from ..perf.spec import UserError
from . import picture, summary
from .advise import Settings, advise
from .target import Input, Target


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit status."""
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        return _advise(options)
    except (UserError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m inductor_vision.advisor", description=__doc__.partition(": ")[2])
    parser.add_argument("model", metavar="MODULE:FACTORY", help="as in torchvision.models:resnet50 or models.py:make")
    parser.add_argument(
        "--input",
        action="append",
        required=True,
        metavar="SHAPE[:DTYPE]",
        help="as in 1x3x224x224 or 4x77:int64; repeated for a model that takes several",
    )
    parser.add_argument("--threads", type=positive(int), metavar="N", help="at most; default: what torch uses here")
    parser.add_argument(
        "--seconds",
        type=positive(float),
        default=60.0,
        metavar="S",
        help="for measuring (default: 60); compiling adds",
    )
    parser.add_argument("--no-compile", action="store_true", help="leave out what takes a compiler, and minutes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw where the time goes")
    return parser


def _advise(options: argparse.Namespace) -> int:
    target = Target(options.model, tuple(map(Input.parse, options.input)))
    check_outputs(options.json, plot=options.plot)
    settings = Settings(options.threads or torch.get_num_threads(), options.seconds, not options.no_compile)
    advice = advise(target, settings, Progress())
    if options.json:
        summary.write_json(advice, options.json)
    print(summary.text(advice))
    if options.plot:
        picture.draw(advice, options.plot)
    return 130 if advice.interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
