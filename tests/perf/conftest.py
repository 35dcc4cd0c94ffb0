"""What contenders switch on for a process of their own, and would change what other tests compile."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from inductor_vision.tests.support.switches import passes_switched_off_again, sampling_switched_off_again


@pytest.fixture(autouse=True)
def _switched_off_again() -> Iterator[None]:
    import torch._inductor.lowering  # noqa: F401  (what was asked for begins with it)

    with passes_switched_off_again(), sampling_switched_off_again():
        yield
