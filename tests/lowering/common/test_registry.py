"""Which calls a template takes, and what becomes of the others."""

from __future__ import annotations

import importlib.util
import pathlib
from collections.abc import Iterator

import inductor_vision
import pytest
import torch
from inductor_vision import deform_conv2d
from inductor_vision.lowering.common import registry
from inductor_vision.lowering.common.registry import Template, template_for
from inductor_vision.lowering.installation import installer
from inductor_vision.ops import registry as ops_registry
from inductor_vision.ops.registry import NAMESPACE, OPS, VisionOp, define_op
from inductor_vision.paths import recorded_paths
from inductor_vision.tests.support.compare import assert_close
from inductor_vision.tests.support.compiled import caches_disabled, compile_and_run, run_python, trace_and_run
from inductor_vision.tests.support.deform_conv2d import Case, Sample, oracle, sample
from torch import Tensor
from torch._inductor import config
from torch.fx.experimental.proxy_tensor import make_fx

PACKAGE = pathlib.Path(inductor_vision.__file__).parent


def loaded_template(name: str) -> Template:
    template = registry._template(OPS[name])
    assert template is not None
    return template


def test_an_operator_has_one_template():
    with pytest.raises(ValueError, match="'deform_conv2d' has two templates"):
        template_for("deform_conv2d", loaded_template("deform_conv2d"))


def test_a_template_is_for_an_operator_that_exists():
    with pytest.raises(ValueError, match=r"no operator 'deform_conv3d'; defined are: .*deform_conv2d"):
        template_for("deform_conv3d", loaded_template("deform_conv2d"))


def test_an_operator_is_defined_once():
    before = OPS["deform_conv2d"]
    with pytest.raises(ValueError, match=r"'deform_conv2d' is defined twice; defined are: .*deform_conv2d"):
        define_op("deform_conv2d(Tensor x) -> Tensor", decomposition=torch.relu, fake=torch.relu)
    assert OPS["deform_conv2d"] is before


def test_a_torchvision_operator_is_served_once():
    with pytest.raises(ValueError, match=r"torchvision::deform_conv2d is served twice"):
        ops_registry.serves_torchvision("deform_conv2d")(deform_conv2d)


def doubled_tanh(x: Tensor) -> Tensor:
    return x.tanh() * 2


@pytest.fixture
def new_op(monkeypatch) -> Iterator[VisionOp]:
    """An operator as a new file of ops/ would define it; gone after the test."""
    from torch._inductor.decomposition import decompositions, fast_random_decomps
    from torch._inductor.lowering import lowerings

    with torch.library._scoped_library(NAMESPACE, "FRAGMENT") as library:
        monkeypatch.setattr(ops_registry, "_library", library)
        op = define_op("doubled_tanh(Tensor x) -> Tensor", decomposition=doubled_tanh, fake=torch.empty_like)
        overload = op.overload
        installer.install()
        yield op
        del OPS[op.name], decompositions[overload], lowerings[overload]
        registry._templates.pop(op.name, None)
        fast_random_decomps.cache_clear()


def test_a_new_operator_runs_eagerly_and_under_autocast(new_op):
    x = torch.randn(3, 5)
    with recorded_paths() as paths:
        assert torch.equal(new_op(x), doubled_tanh(x))
    assert [(path.op, path.kind) for path in paths] == [("doubled_tanh", "eager")]
    with torch.autocast("cpu", torch.bfloat16):
        low = x.bfloat16()
        assert torch.equal(new_op(low), doubled_tanh(low.float()).bfloat16())


def test_an_operator_without_a_template_is_decomposed(new_op):
    x = torch.randn(3, 5)
    compiled = compile_and_run(lambda x: new_op(x) + 1, x)
    assert [str(path) for path in compiled.paths] == [
        "doubled_tanh: decomposition (this operator has no template)",
    ]
    assert compiled.kernels == 1
    assert_close(compiled.result, doubled_tanh(x.double()) + 1, x.dtype)


@pytest.fixture
def looping_op(monkeypatch) -> Iterator[VisionOp]:
    """An operator that loops over data; gone after the test."""
    from torch._inductor.decomposition import decompositions, fast_random_decomps
    from torch._inductor.lowering import fallbacks, lowerings

    def repeated_tanh(x: Tensor, times: Tensor) -> Tensor:
        for _ in range(int(times)):
            x = x.tanh()
        return x * 2

    with torch.library._scoped_library(NAMESPACE, "FRAGMENT") as library:
        monkeypatch.setattr(ops_registry, "_library", library)
        op = define_op(
            "repeated_tanh(Tensor x, Tensor times) -> Tensor",
            decomposition=repeated_tanh,
            fake=lambda x, times: torch.empty_like(x),
            untraceable=lambda x, times: "it loops" if x.dim() > 1 else None,
        )
        installer.install()
        yield op
        del OPS[op.name], decompositions[op.overload], lowerings[op.overload]
        fallbacks.discard(op.overload)
        fast_random_decomps.cache_clear()


def test_an_operator_that_cannot_be_traced_runs_as_it_does_eagerly(looping_op):
    x = torch.randn(3, 5)
    compiled = compile_and_run(lambda x, times: looping_op(x + 1, times) + 1, x, torch.tensor(3))
    assert {str(path) for path in compiled.paths[:-1]} == {
        "repeated_tanh: eager (this operator has no template; it loops: the compiled graph runs the aten decomposition)"
    }
    assert str(compiled.paths[-1]) == (
        "repeated_tanh: eager (the call was not compiled; the aten decomposition ran)"  # when the graph ran
    )
    for times in (3, 1, 0):  # nothing of the data is in the graph
        expected = looping_op(x + 1, torch.tensor(times)) + 1
        assert torch.equal(compiled.function(x, torch.tensor(times)), expected)
    assert torch.equal(compiled.result, looping_op(x + 1, torch.tensor(3)) + 1)


def test_a_template_may_be_a_lowering_or_refuse(new_op):
    from torch._inductor.lowering import lowerings

    lowered = []

    def lower(x):
        lowered.append(x.get_size())
        return lowerings[torch.ops.aten.mul](lowerings[torch.ops.aten.tanh](x), 2)

    def refusal(x: Tensor) -> str | None:
        return "one row is too few" if x.shape[0] == 1 else None

    template_for("doubled_tanh", Template(refusal, lower=lower))
    for rows, expected in ((3, []), (1, ["doubled_tanh: decomposition (one row is too few)"])):
        x = torch.randn(rows, 5)
        compiled = compile_and_run(lambda x: new_op(x) + 1, x)
        assert [str(path) for path in compiled.paths] == expected
        assert_close(compiled.result, doubled_tanh(x.double()) + 1, x.dtype)
    assert lowered == [[3, 5]]


def call(*args: Tensor) -> Tensor:
    return deform_conv2d(*args[:4], padding=1, mask=args[4])


def tensors_of(s: Sample) -> tuple[Tensor, ...]:
    return (*s.args, s.kwargs["mask"])


def refusal_of(s: Sample) -> str | None:
    return registry._refusal(loaded_template("deform_conv2d"), *s.positional)


def test_tensors_that_are_not_on_the_cpu_are_refused():
    s = sample("groups_2")
    assert refusal_of(s) is None
    on_meta = s.replace(**{name: tensor.to("meta") for name, tensor in s.tensors.items()})
    assert refusal_of(on_meta) == "the templates are C++ for the CPU, the tensors are on meta"


def test_devices_that_inductor_generates_triton_code_for(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)  # Triton is installed
    assert not registry._generates_triton(torch.device("cpu"))
    assert registry._generates_triton(torch.device("cuda"))
    assert not registry._generates_triton(torch.device("mps"))
    with config.patch(cpu_backend="triton"):
        assert registry._generates_triton(torch.device("cpu"))
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        assert not registry._generates_triton(torch.device("cpu"))


def test_another_code_generation_gets_the_decomposition():
    from torch._inductor.decomposition import select_decomp_table

    s = sample("groups_2")
    with config.patch(cpu_backend="halide"), recorded_paths() as paths:
        graph = make_fx(call, decomposition_table=select_decomp_table())(*tensors_of(s))
    (path,) = paths
    assert str(path) == "deform_conv2d: decomposition (torch._inductor.config.cpu_backend is 'halide', not 'cpp')"
    targets = [node.target for node in graph.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    assert targets and not [target for target in targets if target.namespace not in ("aten", "prims")]
    assert_close(graph(*tensors_of(s)), oracle(*s.args, **s.kwargs), torch.float32)


def test_a_symbolic_stride_gets_the_decomposition():
    s = sample(Case(size=(7, 11), stride=2))

    def strided(x, offset, weight, bias, mask, stride):
        return deform_conv2d(x, offset, weight, bias, (stride, stride), padding=1, mask=mask)

    traced = trace_and_run(strided, *tensors_of(s), 2, dynamic=True)
    assert [str(path) for path in traced.paths] == [
        "deform_conv2d: decomposition (stride, padding and dilation must be constants)"
    ]
    assert_close(traced.result, oracle(*s.args, **s.kwargs), torch.float32)


@pytest.mark.slow
def test_dynamic_channels_become_constants():
    with caches_disabled(), recorded_paths() as paths:
        compiled = torch.compile(call, fullgraph=True, dynamic=True)
        for channels in (8, 12):
            s = sample(Case(channels=channels, size=(7, 11)))
            assert_close(compiled(*tensors_of(s)), oracle(*s.args, **s.kwargs), torch.float32)
    assert [path.kind for path in paths] == ["template", "template"]


NAME_GONE = """
import torch
import inductor_vision
import torch._inductor.lowering
import torch._inductor.codegen.cpp_template_kernel
from inductor_vision.lowering.installation import installer

del torch._inductor.codegen.cpp_template_kernel.parse_expr_with_index_symbols  # of those in codegen.py

def program(x, boxes, scores):
    return inductor_vision.patch_conv2d(x, torch.ones(4, 4, 3, 3)), inductor_vision.nms(boxes, scores, 0.5)

torch._dynamo.config.capture_dynamic_output_shape_ops = True
torch.manual_seed(0)
args = torch.randn(1, 4, 5, 6), torch.rand(5, 4), torch.rand(5)
with inductor_vision.paths.recorded_paths() as paths:
    torch.testing.assert_close(torch.compile(program, fullgraph=True)(*args), program(*args))
found = {path.op: path for path in reversed(paths)}
assert found["patch_conv2d"].kind == "decomposition" and found["nms"].kind == "eager", paths
for path in found.values():
    assert "its template does not load: ImportError: cannot import name 'parse_expr" in path.detail, paths
    assert f"this is torch {torch.__version__}" in path.detail
try:
    installer.require_lowerings("export_detector")
except RuntimeError as error:
    assert "cannot import name 'parse_expr" in str(error)
else:
    raise AssertionError("nothing is missing")
"""


@pytest.mark.slow
def test_a_template_that_does_not_load_is_decomposed():
    run_python(NAME_GONE)
