"""explain() says which path each call takes, and changes nothing."""

from __future__ import annotations

import pytest
import torch
from inductor_vision import deform_conv2d, explain, patch_conv2d
from inductor_vision.explain import Explanation
from inductor_vision.paths import Path
from inductor_vision.tests.support.compiled import caches_disabled
from inductor_vision.tests.support.deform_conv2d import sample
from inductor_vision.tests.support.patch_conv2d import Case, sample as patch_conv2d_sample
from torch import Tensor, nn

S = sample("neither")
OFFSET, WEIGHT = S.args[1], S.args[2]


def once(x: Tensor) -> Tensor:
    return deform_conv2d(x, OFFSET, WEIGHT, padding=1)


@torch.compiler.disable
def not_compiled(x: Tensor) -> Tensor:
    return once(x)


def broken(x: Tensor) -> tuple[Tensor, Tensor]:
    return once(x).relu(), not_compiled(x)


def kinds(explanation: Explanation) -> list[tuple[str, str]]:
    return [(path.op, path.kind) for path in explanation.paths]


def test_template_and_graph_break():
    for _ in range(2):  # a second explanation is not answered from what the first compiled
        explanation = explain(broken, S.args[0])
        assert kinds(explanation) == [("deform_conv2d", "template"), ("deform_conv2d", "eager")]
        template, eager = str(explanation).splitlines()
        assert template == f"deform_conv2d  template: {explanation.paths[0].detail}"
        assert "GEMM kernel" in template and "not compiled" in eager


def test_decomposition_comes_with_its_reason():
    patches = patch_conv2d_sample(Case(size=(9, 9)))

    def strided(x: Tensor, stride: int) -> Tensor:
        return patch_conv2d(x, *patches.args[1:], stride=stride)

    with torch._dynamo.config.patch(assume_static_by_default=False):
        explanation = explain(strided, patches.args[0], 2)
    assert kinds(explanation) == [("patch_conv2d", "decomposition")]
    assert explanation.paths[0].detail == "stride, padding and dilation must be constants"


def test_backward_is_explained_too():
    explanation = explain(once, S.args[0].clone().requires_grad_())
    assert sorted(kinds(explanation)) == [("deform_conv2d", "template"), ("deform_conv2d_backward", "template")]
    first, second = str(explanation).splitlines()
    assert first.index("template") == second.index("template")  # names of operators are as wide as the longest


def test_no_operator():
    explanation = explain(torch.relu, S.args[0])
    assert explanation.paths == []
    assert str(explanation) == "no operator of inductor_vision was called"


def test_what_was_compiled_stays_as_it_is():
    with caches_disabled():
        compiled = torch.compile(once)
        before = compiled(S.args[0])
    explain(once, S.args[0])
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(compiled(S.args[0]), before)


def test_errors_of_the_function_are_raised():
    with pytest.raises(RuntimeError, match="deform_conv2d: offset must have shape"):
        explain(lambda x: deform_conv2d(x, OFFSET[:, :, 1:], WEIGHT, padding=1), S.args[0])


def test_report_is_a_table():
    paths = [Path("a", "template", "GEMM"), Path("longer", "eager", "a graph break")]
    assert str(Explanation(paths)) == "a       template: GEMM\nlonger  eager: a graph break"


def test_scripted_code_keeps_torchvisions_operators(torchvision):
    class Suppress(nn.Module):
        def forward(self, boxes: Tensor, scores: Tensor) -> Tensor:
            return torchvision.ops.nms(boxes, scores, 0.5)

    class Detector(nn.Module):
        def __init__(self, suppress: nn.Module) -> None:
            super().__init__()
            self.suppress = nn.ModuleList([suppress])

        def forward(self, boxes: Tensor, scores: Tensor) -> Tensor:
            return self.suppress[0](boxes, scores) + 1

    boxes, scores = torch.tensor([[0.0, 0.0, 2.0, 3.0]]).repeat(4, 1), torch.rand(4)
    explanation = explain(Detector(torch.jit.script(Suppress())), boxes, scores)
    assert kinds(explanation) == [("nms", "eager")]
    assert "torch.jit.script made" in str(explanation)
    assert kinds(explain(torch.jit.script(torchvision.ops.nms), boxes, scores, 0.5)) == [("nms", "eager")]
