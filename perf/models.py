"""What the suites of whole models share: contenders that are alone in processes, and other runtimes among them.

For these a model is exported to ONNX once, and the file kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..integrations.onnx import onnx_translation_table
from . import backends
from .spec import Contender, Job, Prepared, Unavailable

REMARK = (
    "Each contender is alone in a process of its own. bf16: under autocast. openvino-default: in the precision that "
    "OpenVINO chooses by itself, bfloat16 where the processor has instructions for it."
)

_OPSET = 19  # the first with all that this package's operators become
_INPUT = "input"
_PACKAGES = ("torch", "torchvision", "transformers", "onnx", "onnxscript")


def contender(
    name: str,
    role: str,
    prepare: Callable[[Job], Prepared],
    *modules: str,
    library: Callable[[], None] = backends.needs_torchvision,
    **more: Any,
) -> Contender:
    """A model in a process of its own, where these modules are installed, and the library that it is from."""

    def check() -> None:
        library()
        backends.needs(*modules)()

    return Contender(name, role, prepare, check=check, isolated=True, **more)


@dataclasses.dataclass(frozen=True)
class OnnxModel:
    """A file, what to call it with, and the names of its results; without names it has one."""

    path: Path
    input: Tensor
    names: Sequence[str] = ()

    def with_results(self, prepared: Prepared) -> Prepared:
        """Give results the form in which the model returns them."""
        results = dict(zip(self.names, prepared.output)) if self.names else prepared.output[0]
        return dataclasses.replace(prepared, output=results)


def runtimes(
    export: Callable[[Job], OnnxModel],
    *,
    library: Callable[[], None] = backends.needs_torchvision,
    **low_precision: Any,
) -> tuple[Contender, ...]:
    """ONNX Runtime, and OpenVINO in float32 and in the precision that it chooses by itself.

    Args:
        export: the model of a job; must be picklable.
        library: see :func:`contender`.
        low_precision: what a contender has that computes in bfloat16, such as a tolerance.
    """
    make = functools.partial(contender, library=library)
    onnxruntime, openvino = (functools.partial(run, export=export) for run in (_onnxruntime, _openvino))
    by_itself = functools.partial(openvino, dtype=None)
    return (
        make("onnxruntime", "peer", onnxruntime, "onnxscript", "onnxruntime"),
        make("openvino", "peer", openvino, "onnxscript", "openvino"),
        make("openvino-default", "peer", by_itself, "onnxscript", "openvino", **low_precision),
    )


def _onnxruntime(job: Job, export: Callable[[Job], OnnxModel]) -> Prepared:
    model = export(job)
    return model.with_results(backends.onnxruntime(str(model.path), {_INPUT: model.input}, job.threads))


def _openvino(job: Job, export: Callable[[Job], OnnxModel], dtype: torch.dtype | None = torch.float32) -> Prepared:
    model = export(job)
    return model.with_results(backends.openvino(str(model.path), [model.input], job.threads, dtype))


def cache_folder() -> Path:
    """Where the files are; they may be removed at any time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "inductor_vision", "onnx")


def exported(name: str, model: nn.Module, input: Tensor, names: Sequence[str] = ()) -> OnnxModel:
    """A model of just these weights, exported now unless that was done before.

    Raises:
        Unavailable: ONNX has not all that the model computes.
    """
    folder = cache_folder()
    path = folder / f"{name}-{_fingerprint(model, input)}.onnx"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as unfinished:
            made = Path(unfinished, path.name)
            _export(model, input, made, names)
            for outdated in folder.glob(f"{name}-*.onnx"):
                outdated.unlink(missing_ok=True)
            made.replace(path)
    return OnnxModel(path, input, names)


def _export(model: nn.Module, input: Tensor, path: Path, names: Sequence[str]) -> None:
    with torch.no_grad():
        program = torch.export.export(model.eval(), (input,))
        try:
            torch.onnx.export(
                program,
                f=str(path),
                dynamo=True,
                verbose=False,
                opset_version=_OPSET,
                external_data=False,
                input_names=[_INPUT],
                output_names=list(names) or None,
                custom_translation_table=onnx_translation_table(),
            )
        except torch.onnx.errors.OnnxExporterError as error:
            reason = str(error.__cause__ or error).splitlines()[0]
            raise Unavailable(f"ONNX has not all that it computes: {reason}") from error


def _fingerprint(model: nn.Module, input: Tensor) -> str:
    """A digest of weights, input, this package's code and the versions of others: all that an ONNX file depends on."""
    digest = hashlib.sha256()
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # one of the libraries may be missing
            digest.update(f"{package} {importlib.metadata.version(package)}\n".encode())
    root = Path(__file__).parents[1]
    for folder in ("ops", "integrations", "perf"):
        for source in sorted((root / folder).rglob("*.py")):
            digest.update(source.read_bytes())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    digest.update(f"{tuple(input.shape)} {input.dtype}".encode())
    return digest.hexdigest()[:16]
