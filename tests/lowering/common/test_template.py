"""What Inductor generates around a template: neighbours fused into its store, results that others read as well."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from inductor_vision import DeformConv2d, deform_conv2d, roi_align
from inductor_vision.lowering.common.template import members, splice_header, struct
from inductor_vision.tests.support.compare import assert_close
from inductor_vision.tests.support.compiled import Compiled, compile_and_run
from inductor_vision.tests.support.deform_conv2d import Case, Sample, oracle, sample
from inductor_vision.tests.support.structs import assert_told_by_name, emitted
from torch import Tensor, nn
from torch._inductor.cpu_vec_isa import pick_vec_isa

FP32, BF16 = torch.float32, torch.bfloat16


def test_a_header_comes_with_what_it_includes_each_once():
    source = splice_header("deform_conv2d.h")
    assert '#include "' not in source
    for header in ("BASE", "GEMM", "DEFORM_CONV2D"):
        assert len(re.findall(f"^#define INDUCTOR_VISION_{header}_H$", source, flags=re.MULTILINE)) == 1
    assert source.index("#define INDUCTOR_VISION_BASE_H") < source.index("#define INDUCTOR_VISION_GEMM_H")


def test_a_struct_has_all_of_its_members_by_name():
    text = struct("Boxes", "float", data="boxes", row=5, column="s", count="n", levels="nullptr")
    assert text == (
        "inductor_vision::Boxes<float>{.data = boxes, .row = 5, .column = s, .count = n, .levels = nullptr}"
    )
    assert struct("Bins", height=True, width=members(a=1)) == "inductor_vision::Bins{.height = true, .width = {.a = 1}}"
    assert_told_by_name(f"kernel({text}, {text});")
    assert len(emitted(f"kernel({text}, {text});")) == 2
    for wrong in (text.replace("row", "column", 1), text.replace(".levels = nullptr", ""), text.replace(".row = ", "")):
        with pytest.raises(AssertionError, match="of Boxes"):  # what every kernel is asked that a test compiles
            assert_told_by_name(wrong)


def arguments(**changes: Any) -> Sample:
    """A call with as many output channels as input channels, so that the result can be added to the input."""
    return sample(Case(channels=16, out_channels=16, size=(9, 13), **changes))


class Block(nn.Module):
    """Deformable convolution, batch norm, activation, residual."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = DeformConv2d(16, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16).eval()
        for values in (self.norm.weight, self.norm.bias, self.norm.running_mean):
            nn.init.normal_(values)
        nn.init.uniform_(self.norm.running_var, 0.5, 2)

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The convolution's own result, and the block's."""
        own = self.conv(x, offset, mask)
        return own, self.norm(own).relu() + x

    def reference(self, x: Tensor, offset: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        own = oracle(x, offset, self.conv.weight, self.conv.bias, padding=1, mask=mask)
        return own, copy.deepcopy(self.norm).double()(own).relu() + x.double()


class Blocks(nn.Module):
    """Blocks of which only the result is used, and blocks whose convolution is used as well."""

    KINDS = tuple(
        (own, dtype, layout)
        for own in (False, True)
        for dtype in (FP32, BF16)
        for layout in ("contiguous", "channels_last")
    )

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block().to(dtype) for _, dtype, _ in self.KINDS)
        samples = [arguments(layout=layout, offset_layout=layout).to(dtype) for _, dtype, layout in self.KINDS]
        self.calls = [(s.args[0], s.args[1], s.kwargs["mask"]) for s in samples]

    def forward(self, calls: list[tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
        results = [block(*call) for block, call in zip(self.blocks, calls)]
        return [result if own else result[1:] for result, (own, _, _) in zip(results, self.KINDS)]


@pytest.fixture(scope="module")
def blocks() -> tuple[Blocks, Compiled]:
    network = Blocks()
    with torch.no_grad():
        compiled = compile_and_run(network, network.calls, config={"freezing": True, "cpp_wrapper": True})
    return network, compiled


def test_bias_norm_activation_and_residual_are_fused(blocks):
    network, compiled = blocks
    with torch.no_grad():
        assert compiled.templates == compiled.fused == compiled.kernels == len(network.KINDS)
        for kind, block, call, results in zip(network.KINDS, network.blocks, network.calls, compiled.result):
            own, dtype, _ = kind
            expected = block.reference(*call)
            for result, values in zip(results, expected if own else expected[1:]):
                assert_close(result, values, dtype, str(kind))
                assert result.stride() == call[0].stride()


def test_what_is_fused_is_vectorized(blocks):
    """Whole vectors of a block's values are loaded, of neighbours in either memory format, and no single ones."""
    if not pick_vec_isa():
        pytest.skip("Inductor has no vector instructions for this CPU")
    network, compiled = blocks
    source = compiled.source.replace("\\n", "\n")
    whole = re.findall(
        r"Vectorized<float>::loadu\((\w+)_block \+ static_cast<int64_t>\(x3 .*<int64_t>\(\d+\)\);", source
    )
    assert len(whole) == len(set(whole)) == len(network.KINDS)
    assert not re.search(r"\w+_block\[", source)


EPILOGUES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "flatten": lambda y, x: y.flatten(1).relu(),
    "view": lambda y, x: y.view(2, 4, 4, 9, 13).sigmoid(),
    "permute": lambda y, x: y.permute(0, 2, 3, 1).relu(),
    "permute_contiguous": lambda y, x: y.permute(0, 2, 3, 1).contiguous() + 1,
    "slice": lambda y, x: y[:, 1:7, 2:].relu(),
    "broadcast": lambda y, x: y[:, :, None] * torch.ones(1, 1, 3, 1, 1),
    "gate": lambda y, x: y * x.mean((2, 3), keepdim=True).sigmoid(),
    "convert": lambda y, x: y.sigmoid().double(),
    "in_place": lambda y, x: y.add_(x).relu_().mul_(2),
    "chain": lambda y, x: (y.relu(), y.relu().sigmoid() * x),
    "fan": lambda y, x: (y, y.relu(), y.relu() * x, y.mean((2, 3))),
    "flip": lambda y, x: y + y.flip(3),
    "pool": lambda y, x: nn.functional.avg_pool2d(y.relu(), 2),
    "cat": lambda y, x: torch.cat([y, x], 1),
    "dying_residual": lambda y, x: y + (x.cumsum(3) * 2),
}


def flat(results: Any) -> list[Tensor]:
    return list(results) if isinstance(results, (tuple, list)) else [results]


def test_epilogues_of_all_shapes():
    calls = []
    for i, (name, layout) in enumerate(
        (name, layout) for name in EPILOGUES for layout in ("contiguous", "channels_last")
    ):
        s = arguments(layout=layout, offset_layout=layout)
        # Each call's input is its own, or all calls would be one.
        calls.append((name, (s.args[0] * (i + 1), *s.args[1:], s.kwargs["mask"])))

    def run(calls):
        return [
            flat(EPILOGUES[name](deform_conv2d(*call[:4], padding=1, mask=call[4]), call[0])) for name, call in calls
        ]

    compiled = compile_and_run(run, calls, config={"cpp_wrapper": True})
    assert compiled.templates == len(calls)
    assert compiled.fused > len(EPILOGUES)
    for (name, call), results in zip(calls, compiled.result):
        expected = EPILOGUES[name](oracle(*call[:4], padding=1, mask=call[4]), call[0].double())
        for result, values in zip(results, flat(expected)):
            assert_close(result, values, FP32, name)


class Network(nn.Module):
    """As models use it: one convolution makes offset and mask, batch norm and activation follow, then the next."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.offset = nn.Conv2d(16, 27, 3, padding=1)
        self.block = Block()
        self.head = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        y, x_offset, mask = self.offset(x).chunk(3, dim=1)
        return self.head(self.block(x, torch.cat([y, x_offset], 1), mask.sigmoid())[1])


class ChunkViews(nn.Module):
    """Offset and mask are views of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Conv2d(16, 27, 3, padding=1)
        self.conv = DeformConv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        offset, mask = self.offset(x).split([18, 9], dim=1)
        return self.conv(x, offset, mask)


@pytest.mark.parametrize("freezing", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_networks(freezing):
    network, views = Network().eval(), ChunkViews().eval()

    def run(image, x):
        return network(image), views(x)

    image, x = torch.randn(2, 3, 12, 15), torch.randn(2, 16, 12, 15)
    with torch.no_grad():
        compiled = compile_and_run(run, image, x, config={"cpp_wrapper": True, "freezing": freezing})
        expected = copy.deepcopy(network).double()(image.double()), copy.deepcopy(views).double()(x.double())
    assert compiled.templates == 2
    assert compiled.fused == 1
    for result, values in zip(compiled.result, expected):
        assert_close(result, values, FP32)


class TwoLevels(nn.Module):
    """The gradient of the finer map is what regions and the coarser level contribute, added up channels_last."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Conv2d(3, 6, 3, stride=4, padding=1)
        self.coarse = nn.Conv2d(6, 6, 3, stride=2, padding=1)

    def forward(self, image: Tensor, rois: Tensor) -> Tensor:
        fine = self.fine(image)
        return roi_align(fine, rois, 2, 0.25, 2).sum() + self.coarse(fine.relu()).square().sum()


def test_a_neighbour_of_another_memory_format():
    torch.manual_seed(0)
    network, image = TwoLevels(), torch.randn(2, 3, 32, 40)
    rois = torch.tensor([[0.0, 3, 4, 20, 30], [1, 0, 0, 39, 31], [0, 10, 2, 15, 9]])

    def step(module: Callable[..., Tensor]) -> list[Tensor]:
        network.zero_grad()
        module(image, rois).backward()
        return [parameter.grad.clone() for parameter in network.parameters()]

    for result, expected in zip(
        step(torch.compile(network, fullgraph=True, options={"cpp_wrapper": True})), step(network)
    ):
        assert_close(result, expected, FP32)
