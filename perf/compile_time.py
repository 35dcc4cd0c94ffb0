"""How long a contender compiles: to its first result, with empty caches and with filled ones.

Each measurement is a process of its own, since what a process once compiled it keeps. It includes what a user waits
for after ``import torch``: importing Inductor, tracing, generating, the C++ compiler, and the first call.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time


def compile_seconds(suite: str, case: str, contender: str, threads: int) -> tuple[float, float]:
    """Cold and warm.

    Raises:
        RuntimeError: the process failed; the message holds the end of what it said.
    """
    with tempfile.TemporaryDirectory(prefix="inductor_vision_perf_") as cache:
        cold, warm = (_measure_in_child(cache, suite, case, contender, threads) for _ in range(2))
    return cold, warm


def _measure_in_child(cache: str, *arguments: object) -> float:
    command = [sys.executable, "-m", __name__, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache})
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _main(suite_name: str, case_name: str, contender_name: str, threads: str) -> None:
    import torch

    from .spec import Job
    from .suites import load_suites

    suite = load_suites()[suite_name]
    case = next(case for case in suite.cases if case.name == case_name)
    contender = next(contender for contender in suite.contenders if contender.name == contender_name)
    torch.set_num_threads(int(threads))
    job = Job(case, case.build(), int(threads))
    start = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):
        contender.prepare(job)
    print(json.dumps(time.perf_counter() - start))


if __name__ == "__main__":
    _main(*sys.argv[1:])
