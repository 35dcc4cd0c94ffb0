"""Importing the package is cheap, and leaves Inductor alone until something is compiled."""

from inductor_vision.tests.support.compiled import run_python

IMPORT = """
import sys, time
import torch
start = time.perf_counter()
import inductor_vision
print(time.perf_counter() - start)
assert not [name for name in sys.modules if name.partition(".")[2].startswith("_inductor")]
"""


def test_import_is_cheap_and_does_not_import_inductor():
    assert float(run_python(IMPORT)) < 0.25
