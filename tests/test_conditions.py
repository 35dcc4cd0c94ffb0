"""The conditions that conftest.py promises hold."""

import pytest
import torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("count", [1 << 10, 1 << 14, 1 << 22])
def test_fresh_memory_is_poisoned(poisoned_memory, count, dtype):
    assert torch.empty(count, dtype=dtype).isnan().all()


def test_seed_is_fixed():
    first = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(3), first)
