"""That Inductor looks at the processor at hand whatever it is told to compile for; what is done about it is tested in
tests/test_target.py."""

from __future__ import annotations

import pytest
from inductor_vision.tests.support.machine_code import only_for_x86_64
from inductor_vision.tests.support.oldest_torch import with_oldest_torch
from torch._inductor import config
from torch._inductor.cpu_vec_isa import pick_vec_isa


@with_oldest_torch
@only_for_x86_64
def test_torch_still_needs_this():
    """Where this fails, ``cpp.march`` decides about vectors: the module can go."""
    here = pick_vec_isa()
    if not here:
        pytest.skip("this CPU has no vector instructions that Inductor uses")
    with config.patch({"cpp.march": "x86-64-v2"}):
        assert pick_vec_isa() is here
