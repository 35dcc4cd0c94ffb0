"""Inductor generates code for the instructions at hand, whatever it is told to compile for.

The fault, seen in torch 2.13 to 2.15: ``cpp.march`` reaches the compiler, but vectors are chosen by what the machine at
hand has, AVX-512, VNNI and AMX included, and the compiler is told to use these as well. ``cpp.simdlen`` chooses a
width, but not between AVX-512 with and without the later additions. Whether oneDNN is called for convolutions and
linear layers of low precision is asked of the machine at hand too.

The way around: for the levels of x86-64 it is the level that answers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest.mock import patch

from ..common.machine import LEVELS


@contextlib.contextmanager
def instructions_of(target: str) -> Iterator[None]:
    """Within this context code is generated for one of :data:`LEVELS`."""
    from ..inductor.packaging import VecAVX2, VecAVX512, cpu_vec_isa, mkldnn_fusion
    from ..inductor.tables import config

    class OldestAVX512(VecAVX512):
        def __bool__(self) -> bool:
            """Yes; otherwise it would look what else is at hand, and use that."""
            return True

    bits = LEVELS[target].vector_bits
    isas = [isa for isa in (OldestAVX512(), VecAVX2()) if isa.bit_width() == bits]

    with (
        patch.object(cpu_vec_isa, "valid_vec_isa_list", lambda: isas),
        patch.object(mkldnn_fusion, "is_mkldnn_bf16_supported", lambda device: device != "cpu" or bits == 512),
        patch.object(mkldnn_fusion, "is_mkldnn_fp16_supported", lambda device: device != "cpu"),
        # Given a width, Inductor does not look into the environment for the instructions to use.
        config.patch({"cpp.march": target, "cpp.simdlen": bits}),
    ):
        yield
