"""The fit of rates to measurements: from times that are exact it finds the rates that they were made with."""

from typing import Any

import pytest
from inductor_vision.lowering.passes.convolution_kernels import LIBRARY_RATES, WINOGRAD_RATES
from inductor_vision.perf import convolution_costs

KERNELS = {"onednn": LIBRARY_RATES, "winograd-4": WINOGRAD_RATES, "winograd-4-transforming": WINOGRAD_RATES}


def rows(bits: int) -> list[dict[str, Any]]:
    made = []
    for pair in ((64, 64), (256, 256), (512, 512)):
        for problem in convolution_costs._problems(*pair):
            for threads in (1, 2):
                row: dict[str, Any] = {"shape": [problem.batch, *pair, *problem.size], "threads": threads}
                row["seconds"] = {
                    name: convolution_costs.work_of(row, name).seconds(rates[bits]) for name, rates in KERNELS.items()
                }
                made.append(row)
    return made


@pytest.mark.parametrize("bits", [256, 512])
def test_rates_are_found(bits):
    measured = rows(bits)
    found = convolution_costs.fit(measured, ["winograd-4", "winograd-4-transforming"])
    assert found == pytest.approx(WINOGRAD_RATES[bits], rel=1e-6)
    assert convolution_costs.fit(measured, ["onednn"]) == pytest.approx(LIBRARY_RATES[bits], rel=1e-6)
    first, second, *_ = convolution_costs._report(measured)
    assert first.startswith("LIBRARY_RATES: ") and "off by 1.00x" in first
    assert "off by 1.00x" in second
