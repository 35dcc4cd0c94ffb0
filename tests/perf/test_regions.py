"""The benchmarks of the operators on regions: do their contenders compute what they are said to compute?"""

import dataclasses
from types import ModuleType

import pytest
import torch
from inductor_vision.perf import backends, regions
from inductor_vision.perf.regions import TRAINING, Problem, Shape
from inductor_vision.perf.spec import Case, Contender, Job, Unavailable
from inductor_vision.perf.suites import multiscale_roi_align, ps_roi_align, ps_roi_pool, roi_align, roi_pool
from inductor_vision.perf.verify import relative_error, tensors

BF16 = torch.bfloat16


@dataclasses.dataclass(frozen=True)
class Small:
    """A problem that takes no time."""

    suite: ModuleType
    shape: Shape
    what: str = "forward"

    def __str__(self) -> str:
        name = self.suite.SUITE.name + ("" if self.what == "forward" else f"-{self.what}")
        return f"{name}-{self.shape}".replace(" ", "")

    @property
    def case(self) -> Case:
        return regions.case("small", getattr(self.suite, f"_{self.what}"), self.shape)

    def build(self) -> Problem:
        return self.case.build()

    def contenders(self) -> list[Contender]:
        return [c for c in self.suite.SUITE.contenders if c.name in TRAINING or self.what == "forward"]


_PLAIN = Shape(5, (20, 27), 40, batch=2)
_BY_BIN = Shape(18, (20, 27), 40, bins=3, batch=2)
_PYRAMID = Shape(3, (800, 1088), 60, samples=2, strides=(4, 8, 16, 32))
SMALL = [
    Small(roi_align, dataclasses.replace(_PLAIN, samples=2)),
    Small(roi_align, dataclasses.replace(_PLAIN, samples=0, bins=3, aligned=True)),
    Small(roi_align, dataclasses.replace(_PLAIN, samples=2, dtype=BF16)),
    Small(roi_align, dataclasses.replace(_PLAIN, samples=2), what="backward"),
    Small(roi_pool, _PLAIN),
    Small(roi_pool, _PLAIN, what="training"),
    Small(roi_pool, _PLAIN, what="backward"),
    Small(ps_roi_align, dataclasses.replace(_BY_BIN, samples=2)),
    Small(ps_roi_align, dataclasses.replace(_BY_BIN, samples=2), what="backward"),
    Small(ps_roi_pool, _BY_BIN),
    Small(ps_roi_pool, _BY_BIN, what="backward"),
    Small(multiscale_roi_align, _PYRAMID),
    Small(multiscale_roi_align, dataclasses.replace(_PYRAMID, dtype=BF16)),
]
COMPARED = [(small, c) for small in SMALL for c in small.contenders() if c.role != "limit"]


def prepare(small, contender):
    problem = small.build()
    try:
        contender.check()
        return problem, contender.prepare(Job(small.case, problem, 1))
    except Unavailable as reason:
        pytest.skip(str(reason))


def named(pair):
    return f"{pair[0]}-{pair[1].name}"


@pytest.fixture
def nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(backends, "compiled", lambda module, tensors, *, dynamic: backends.eager(module, tensors))
    monkeypatch.setattr(backends, "packaged", backends.eager)


def refuses(pair):
    small, contender = pair
    return small.shape.dtype == BF16 and contender.name.startswith(("torchvision", "onnxruntime"))


@pytest.mark.parametrize("pair", [pair for pair in COMPARED if not refuses(pair)], ids=named)
def test_contenders_agree_with_the_reference(pair, nothing_is_compiled):
    small, contender = pair
    problem, prepared = prepare(small, contender)
    right = regions.reference(problem)
    first, *further = tensors(right)
    assert first.dtype == torch.float64 and first.shape == problem.result
    assert sum(tensor.nbytes for tensor in further) == problem.further_bytes
    assert relative_error(prepared.output, right) < small.case.tolerance


@pytest.mark.parametrize("pair", [pair for pair in COMPARED if refuses(pair)], ids=named)
def test_who_has_no_kernel_for_bfloat16_says_so(pair):
    small, contender = pair
    with pytest.raises(Unavailable, match=r"no kernel for torch\.bfloat16"):
        contender.prepare(Job(small.case, small.build(), 1))


@pytest.mark.parametrize("small", SMALL, ids=str)
def test_the_decomposition_stands_in_for_torchvision(small, monkeypatch):
    with_torchvision = regions.reference(small.build())
    monkeypatch.setattr(backends, "needs_torchvision", backends.needs("no_such_module"))
    assert relative_error(regions.reference(small.build()), with_torchvision) < 1e-6


@pytest.mark.parametrize("small", SMALL, ids=str)
def test_channels_last_goes_in_and_comes_out(small, nothing_is_compiled):
    contender = next(c for c in small.contenders() if c.name == "ours-channels-last")
    _, prepared = prepare(small, contender)
    for output in tensors(prepared.output):
        assert output.is_contiguous(memory_format=torch.channels_last)
        assert not output.is_contiguous()


@pytest.mark.parametrize(
    ("shape", "further", "elements"),
    [
        (Shape(4, (30, 40), 100, bins=2), 0, 4 * 30 * 40 + 5 * 100 + 100 * 4 * 2 * 2),
        (Shape(4, (30, 40), 100, bins=2), 8, 4 * 30 * 40 + 5 * 100 + 100 * 4 * 2 * 2 + 8),
        (Shape(4, (30, 40), 3, bins=2, samples=2), 0, 4 * (3 * 4 * 4 * 4) + 3 * 4 * 2 * 2),
    ],
    ids=["all", "two-outputs", "few-boxes"],
)
def test_the_limit_moves_the_bytes_of_input_and_output(shape, further, elements):
    problem = Problem(
        shape,
        regions.maps_and_rois(shape),
        result=(shape.boxes, shape.channels, shape.bins, shape.bins),
        ours=torch.add,
        decomposition=torch.add,
        torchvision=torch.add,
        further_bytes=4 * further,
    )
    limit = next(contender for contender in regions.contenders() if contender.role == "limit")
    copied = limit.prepare(Job(None, problem, 1)).output
    assert 2 * copied.nbytes == 4 * elements


def test_boxes():
    shape = Shape(1, (100, 200), 1000, batch=4)
    _, rois = regions.maps_and_rois(shape)
    image, x1, y1, x2, y2 = rois.unbind(1)
    assert image.long().bincount().tolist() == [250] * 4
    for low, high, length in ((x1, x2, 200), (y1, y2, 100)):
        centre, side = (low + high) / 2, high - low
        assert 0 <= centre.min() < 0.05 * length and 0.95 * length < centre.max() <= length
        assert 4 - 1e-4 <= side.min() < 6 and 0.38 * length < side.max() <= 0.4 * length + 4
        assert (low < 0).any() and (high > length).any()


@pytest.mark.parametrize("inclusive", [False, True])
def test_bins_are_the_same_in_float32_and_float64(torchvision, inclusive):
    input, rois = regions.maps_and_rois(Shape(7 * 7, (100, 300), 2000))
    pool = torchvision.ops.roi_pool if inclusive else torchvision.ops.ps_roi_pool
    certain = regions.with_certain_bins(rois, 7, inclusive)

    def error(rois):
        return relative_error(pool(input, rois, 7), pool(input.double(), rois.double(), 7))

    assert error(rois) > 1e-2
    assert error(certain) < 1e-6
    assert 0 < (certain != rois).any(dim=1).sum() < 0.2 * len(rois)
    assert (certain - rois).max() < 5


def test_inputs_are_the_same_at_every_call():
    for small in SMALL:
        first, second = small.build(), small.build()
        assert first.tensors[0].dtype == small.shape.dtype
        assert all(torch.equal(a, b) for a, b in zip(first.tensors, second.tensors))


def test_descriptions():
    assert str(Shape(256, (50, 68), 1)) == "256 ch, 50x68, batch 1, 1 box, 7x7 bins"
    assert str(Shape(8, (5, 7), 9, bins=2, samples=0, aligned=True, batch=3)) == (
        "8 ch, 5x7, batch 3, 9 boxes, 2x2 bins, adaptive samples, aligned"
    )
    assert str(Shape(8, (32, 64), 9, samples=2, strides=(4, 8), dtype=BF16)) == (
        "8 ch, 32x64, batch 1, 9 boxes, 7x7 bins, 2x2 samples, strides 4 8, bfloat16"
    )
