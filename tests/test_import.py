"""Importing the package is cheap, and leaves Inductor alone until something is compiled."""

from inductor_vision.tests.support.compiled import run_python

# What takes its time to import, and is needed only when something is compiled.
IMPORT = """
import sys
import torch
before = set(sys.modules)
import inductor_vision
roots = {name.partition(".")[0] for name in set(sys.modules) - before}
assert "inductor_vision" in roots
assert not roots & {"sympy", "triton", "torchvision", "numpy", "filelock"}, roots
heavy = ("torch._inductor", "torch._dynamo", "torch.fx.experimental.symbolic_shapes")
assert not [name for name in set(sys.modules) - before if name.startswith(heavy)]
assert not [name for name in sys.modules if name.partition(".")[2].startswith("_inductor")]
"""


def test_import_is_cheap_and_does_not_import_inductor():
    run_python(IMPORT)
