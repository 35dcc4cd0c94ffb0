"""Benchmarks: every operator against its peers and against what the machine could do at best.

``python -m inductor_vision.perf`` lists and runs them, and writes docs/benchmarks.md from the results that are kept. A
benchmark is data: a module in ``suites/`` with a :class:`~inductor_vision.perf.spec.Suite` named ``SUITE``. Adding one
changes no other file.
"""
