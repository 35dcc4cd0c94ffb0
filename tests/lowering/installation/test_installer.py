"""How Inductor learns of the operators: all that is entered into its tables, or nothing."""

from __future__ import annotations

from typing import Any

import inductor_vision
import pytest
import torch
from inductor_vision.lowering.common import cache_key
from inductor_vision.lowering.installation import installer
from inductor_vision.tests.support.compiled import run_python
from torch._inductor import config

INSTALLED = """
from torch._inductor.decomposition import decompositions, select_decomp_table
from torch._inductor.lowering import lowerings
assert len(inductor_vision.ops.registry.OPS) > 1
for op in inductor_vision.ops.registry.OPS.values():
    assert op.overload in decompositions and op.overload in select_decomp_table() and op.overload in lowerings, op.name
tag = torch.compiler.config.cache_key_tag
assert tag.startswith("mine+inductor_vision-" + inductor_vision.__version__), tag
inductor_vision.lowering.common.cache_key.tag_caches()
assert torch.compiler.config.cache_key_tag == tag
"""


@pytest.mark.parametrize(
    "imports",
    [
        "import inductor_vision\nassert 'torch._inductor' not in sys.modules\nimport torch._inductor.lowering",
        "import torch._inductor.lowering\ntorch._inductor.decomposition.select_decomp_table()\nimport inductor_vision",
        "import inductor_vision.lowering.inductor.tables",
        "import inductor_vision.lowering.inductor.codegen",
    ],
    ids=["package_first", "inductor_first", "its_tables_first", "its_code_generation_first"],
)
def test_installed_whatever_is_imported_first(imports):
    run_python(f"import sys, torch\ntorch.compiler.config.cache_key_tag = 'mine'\n{imports}\n{INSTALLED}")


def tables_of_inductor() -> dict[str, Any]:
    """What :func:`inductor_vision.lowering.installation.installer.install` changes."""
    from torch._inductor import ir, sizevars
    from torch._inductor.decomposition import decompositions, fast_random_decomps
    from torch._inductor.lowering import fallbacks, lowerings, needs_realized_inputs

    return {
        "view": ir.View._dynamic_reshape_indexer,
        "strides": (sizevars.stride_at, sizevars.simplify_index_in_vec_range),
        "decompositions": decompositions.copy(),
        "their copy": fast_random_decomps().copy(),
        "lowerings": lowerings.copy(),
        "fallbacks": fallbacks.copy(),
        "needs_realized_inputs": needs_realized_inputs.copy(),
        "passes": config.pre_grad_custom_pass,
        "passes behind": config.joint_custom_pre_pass,
        "tag": torch.compiler.config.cache_key_tag,
        "key": cache_key.backend_passes().copy(),
    }


STEPS = "_register_operators", "_serve_torchvision", "_add_fusion_pass", "_add_folding_pass", "_add_convolution_pass"


@pytest.mark.parametrize("step", STEPS)
def test_what_fails_leaves_inductor_as_it_was(step, monkeypatch, caplog):
    original = getattr(installer, step)

    def fail():
        from torch._inductor.lowering import fallbacks, needs_realized_inputs

        original()
        for table in (fallbacks, needs_realized_inputs):
            table.add(torch.ops.inductor_vision.nms.default)
        config.pre_grad_custom_pass = config.joint_custom_pre_pass = ["a pass"]
        cache_key.tag_caches("a tag")
        raise AttributeError("module 'torch._inductor' has no attribute 'it'")

    before = tables_of_inductor()
    monkeypatch.setattr(installer, step, fail)
    monkeypatch.setattr(installer, "_not_installed", None)
    installer.install()
    assert tables_of_inductor() == before
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "AttributeError: module 'torch._inductor' has no attribute 'it'" in record.getMessage()
    assert (
        f"this is torch {torch.__version__}; inductor_vision {inductor_vision.__version__} is tested with torch 2.13"
        in (record.getMessage())
    )


UNKNOWN_TORCH = """
import logging
import torch
import inductor_vision
from inductor_vision.lowering.workarounds import device_assertions

warnings = []
handler = logging.Handler()
handler.emit = lambda record: warnings.append(record.getMessage())
logging.getLogger("inductor_vision").addHandler(handler)

def install():
    raise AttributeError("module 'torch._inductor.lowering' has no attribute 'moved'")

device_assertions.install = install
inductor_vision.fuse_depthwise_separable()

def program(x, boxes, scores):
    y = inductor_vision.deform_conv2d(x, torch.zeros(1, 18, 5, 6), torch.ones(4, 4, 3, 3), padding=1)
    return y.relu(), inductor_vision.nms(boxes, scores, 0.5)

torch._dynamo.config.capture_dynamic_output_shape_ops = True
torch.manual_seed(0)
args = torch.randn(1, 4, 5, 6, requires_grad=True), torch.rand(5, 4), torch.rand(5)
result, expected = torch.compile(program, fullgraph=True)(*args), program(*args)
torch.testing.assert_close(result, expected)
torch.testing.assert_close(*(torch.autograd.grad(out.sum(), args[0]) for out, _ in (result, expected)))

import torch._inductor.lowering as module
for loader in (module.__loader__, module.__spec__.loader):
    assert type(loader).__module__ == "_frozen_importlib_external", loader
assert torch.compiler.config.cache_key_tag == "" and torch._inductor.config.pre_grad_custom_pass is None
(warning,) = warnings
assert "AttributeError" in warning and "'moved'" in warning and f"torch {torch.__version__}" in warning, warning

explanation = inductor_vision.explain(inductor_vision.nms, *args[1:], 0.5)
assert {path.kind for path in explanation.paths} == {"eager"}
assert "'moved'" in explanation.problem and explanation.problem in str(explanation)
inductor_vision.fuse_depthwise_separable()
assert torch._inductor.config.pre_grad_custom_pass is None
assert len(warnings) == 2 and warnings[1].startswith("fuse_depthwise_separable() does not change what is compiled: A")
try:
    inductor_vision.export_detector(torch.nn.Identity().eval(), torch.rand(3, 5, 6), "detector.pt2")
except RuntimeError as error:
    assert "export_detector: the kernels of inductor_vision cannot be compiled: AttributeError" in str(error)
else:
    raise AssertionError("exported")
"""


@pytest.mark.slow
def test_programs_compile_with_a_torch_that_the_operators_cannot_be_installed_in():
    run_python(UNKNOWN_TORCH)
