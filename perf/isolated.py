"""Contenders in processes of their own, for those that change what others in the same process would do, and for whole
models: each library's pool of threads, allocator and spinning is its own then.

A process prepares its contender and then waits to be told what to do: one computes at a time, in the runner's order,
and has its threads come to rest before the next one does. It times its calls itself, without the 50 microseconds that
messages take.
"""

from __future__ import annotations

import contextlib
import functools
import io
import multiprocessing
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from .interleaving import time_call, wait_until_idle
from .memory import extra_memory
from .spec import Case, Job, Prepared, Unavailable


def prepare_in_own_process(prepare: Callable[[Job], Prepared], job: Job) -> Prepared:
    """What ``prepare`` gives, its callables run in a new process, which ends when none of them is left.

    ``prepare`` and the job's case are pickled; the process builds the case's inputs anew.

    Raises:
        Unavailable: as ``prepare`` does.
        RuntimeError: anything else went wrong.
    """
    process = _Process(prepare, job.case, job.threads)
    output = torch.load(io.BytesIO(process.ask("output")))
    return Prepared(
        functools.partial(process.ask, "call"),
        output,
        memory=functools.partial(process.ask, "memory"),
        seconds=functools.partial(process.ask, "seconds"),
        settle=functools.partial(process.ask, "settle"),
        shares=functools.partial(process.ask, "shares"),
    )


class _Process:
    """The runner's side. The other side ends once this object, and with it the connection, is gone."""

    def __init__(self, *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would inherit what must not be shared, OpenMP's threads
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, *arguments), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, question: str) -> Any:
        try:
            self._connection.send(question)
            answer = self._connection.recv()
        except (EOFError, ConnectionError) as error:
            self._process.join()
            raise RuntimeError(f"its process ended with exit code {self._process.exitcode}") from error
        if isinstance(answer, Exception):
            raise answer
        return answer


def _serve(connection: Connection, prepare: Callable[[Job], Prepared], case: Case, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the runner is interrupted, and ends this process
    torch.set_num_threads(threads)
    answers: dict[str, Callable[[], Any]] = {}
    with contextlib.suppress(EOFError), contextlib.redirect_stdout(sys.stderr):
        while True:
            question = connection.recv()
            try:
                if not answers:
                    answers = _answers(prepare(Job(case, case.build(), threads)))
                answer = answers[question]()
            except Unavailable as reason:
                answer = reason
            except Exception as error:  # of classes that the runner's process may not know
                answer = RuntimeError(f"{type(error).__name__}: {error}")
            connection.send(answer)


def _answers(prepared: Prepared) -> dict[str, Callable[[], Any]]:
    def output() -> bytes:
        file = io.BytesIO()
        torch.save(prepared.output, file)
        return file.getvalue()

    def call() -> None:
        prepared.call()

    return {
        "output": output,
        "call": call,
        "seconds": functools.partial(time_call, prepared.call),
        "settle": wait_until_idle,
        "memory": prepared.memory or functools.partial(extra_memory, prepared.call, prepared.lean),
        "shares": prepared.shares or dict,
    }
