"""``python -m inductor_vision.perf.graph_breaks``: where graphs of the models in the suite ``transformers`` break.

It traces each of them, at the suite's size and with random weights, as it comes, after ``accelerate_transformers()``,
and then with ``fullgraph=True``, and prints the graph breaks as a table in Markdown.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..integrations.transformers import accelerate_transformers
from .report import markdown_table
from .spec import matching
from .suites.transformers import SUITE

COLUMNS = ("model", "stock", "accelerated", "accelerated, `fullgraph=True`")


def graph_breaks(model: nn.Module, inputs: Mapping[str, Tensor], fullgraph: bool = False) -> int:
    """How many there are where ``torch.compile`` traces a call.

    Raises:
        torch._dynamo.exc.Unsupported: there is one, with ``fullgraph``.
    """
    graphs = 0

    def count(graph: torch.fx.GraphModule, _: Sequence[Any]) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=count, fullgraph=fullgraph)(**inputs)
    if not graphs:
        raise RuntimeError("nothing of the model is compiled")
    return graphs - 1


def rows(cases: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """A row for each case. From the first on, transformers is accelerated."""
    problems = [(case.name, case.build()) for case in SUITE.cases if case.name in cases]
    calls = [(name, of.detector.model, {"pixel_values": of.image[None], **of.inputs}) for name, of in problems]
    stock = [graph_breaks(model, inputs) for _, model, inputs in calls]
    accelerate_transformers()
    for (name, model, inputs), before in zip(calls, stock):
        after = graph_breaks(model, inputs)
        try:
            in_one = str(graph_breaks(model, inputs, fullgraph=True))
        except torch._dynamo.exc.Unsupported:
            in_one = "it breaks"
        yield name, str(before), str(after), in_one


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m inductor_vision.perf.graph_breaks", description=__doc__)
    parser.add_argument("--case", action="append", default=[], metavar="GLOB", help="only these; may be repeated")
    options = parser.parse_args()
    cases = matching("case", SUITE.case_names(), options.case)
    print(markdown_table([COLUMNS, ["---", *["--:"] * (len(COLUMNS) - 1)], *rows(cases)]))


if __name__ == "__main__":
    main()
