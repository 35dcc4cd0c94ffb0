"""The user's model and its inputs: from what was typed to something that runs."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import importlib.util
import operator
import os
import random
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..perf.spec import UserError

_DTYPES = {
    **dict.fromkeys(("float32", "float", "f32", "fp32"), torch.float32),
    **dict.fromkeys(("float64", "double", "f64", "fp64"), torch.float64),
    **dict.fromkeys(("bfloat16", "bf16"), torch.bfloat16),
    **dict.fromkeys(("float16", "half", "f16", "fp16"), torch.float16),
    **dict.fromkeys(("int64", "long"), torch.int64),
    **dict.fromkeys(("int32", "int"), torch.int32),
    "uint8": torch.uint8,
    "bool": torch.bool,
}
# Lines of these folders tell a user nothing about an error.
_OWN = tuple(f"{Path(__file__).parents[1] / folder}{os.sep}" for folder in ("advisor", "perf"))
_EXPECTED = "as in torchvision.models:resnet50 or models.py:make"


@dataclasses.dataclass(frozen=True)
class Input:
    """One tensor that the model is called with."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    @classmethod
    def parse(cls, text: str) -> Input:
        """From ``1x3x224x224`` or ``4x77:int64``.

        Raises:
            UserError: it is neither.
        """
        shape, colon, dtype = text.partition(":")
        try:
            sizes = tuple(map(int, shape.split("x")))
        except ValueError:
            sizes = ()
        if not sizes or min(sizes) < 1:
            raise UserError(f"--input {text}: expected sizes like 1x3x224x224, or with a dtype like 4x77:int64")
        if colon and dtype not in _DTYPES:
            raise UserError(f"--input {text}: no dtype {dtype!r}; there are: {', '.join(_DTYPES)}")
        return cls(sizes, _DTYPES[dtype] if colon else torch.float32)

    def make(self, generator: torch.Generator) -> Tensor:
        """Normally distributed; integers are 0 or 1, which are indices into any table, but bytes are of all values."""
        if self.dtype.is_floating_point:
            return torch.randn(self.shape, generator=generator).to(self.dtype)
        most = 256 if self.dtype == torch.uint8 else 2
        return torch.randint(0, most, self.shape, generator=generator).to(self.dtype)

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.shape))} {str(self.dtype).removeprefix('torch.')}"


@dataclasses.dataclass(frozen=True)
class Program:
    """A model in eval mode and what it is called with."""

    model: nn.Module
    inputs: tuple[Tensor, ...]

    def run(self) -> list[Tensor]:
        """Every tensor that the model returns, without autograd."""
        with torch.no_grad():
            return output_tensors(self.model(*self.inputs))

    def copy(self) -> Program:
        return Program(copy.deepcopy(self.model), self.inputs)


def output_tensors(output: Any) -> list[Tensor]:
    """The tensors of whatever nesting of lists, tuples and dictionaries a model returns."""
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


@dataclasses.dataclass(frozen=True)
class Target:
    """What was asked for, by names, so that it can be sent to another process and loaded there.

    ``weights`` is a file with the state that the model is given: one with random weights has others in each process.
    """

    path: str
    inputs: tuple[Input, ...]
    weights: Path | None = None

    def load(self) -> Program:
        """The model as the factory makes it, in eval mode.

        Raises:
            UserError: it cannot be imported, or is no model that can be advised on.
        """
        torch.manual_seed(0)
        random.seed(0)
        model = load_model(self.path).eval()
        if self.weights:
            model.load_state_dict(torch.load(self.weights))
        generator = torch.Generator().manual_seed(0)
        return Program(model, tuple(input.make(generator) for input in self.inputs))

    def describe_inputs(self) -> str:
        return ", ".join(map(str, self.inputs))


def load_model(path: str) -> nn.Module:
    """What ``MODULE:FACTORY`` names: a module, or what a callable without arguments returns.

    Raises:
        UserError: it cannot be had; the message says why.
    """
    module_name, _, factory_name = path.rpartition(":")
    if not module_name or not factory_name:
        raise UserError(f"{path!r} is not MODULE:FACTORY, {_EXPECTED}")
    module = _import(module_name)
    try:
        factory = operator.attrgetter(factory_name)(module)
    except AttributeError as error:
        raise UserError(f"{module_name} has no {factory_name!r}") from error
    model = factory
    if not isinstance(factory, nn.Module):
        if not callable(factory):
            raise UserError(
                f"{path} is of type {_type_name(factory)}: neither an nn.Module nor a function that makes one"
            )
        try:
            model = factory()
        except Exception as error:  # the factory is the user's: whatever it raises is what is to be said
            raise UserError(f"{path}() failed: {describe_error(error)}") from error
        if not isinstance(model, nn.Module):
            raise UserError(f"{path}() returned an object of type {_type_name(model)}, not an nn.Module")
    _check_model(path, model)
    return model


def _import(name: str) -> ModuleType:
    try:
        if name.endswith(".py") or Path(name).name != name:
            return _import_file(Path(name))
        if "" not in sys.path and str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and f"{name}.".startswith(f"{error.name}."):
            raise UserError(f"there is no module {error.name!r}; expected MODULE:FACTORY, {_EXPECTED}") from error
        raise UserError(f"{name} cannot be imported: {describe_error(error)}") from error
    except (Exception, SystemExit) as error:  # whatever the code of the user's module raises
        if isinstance(error, UserError):
            raise
        raise UserError(f"{name} cannot be imported: {describe_error(error)}") from error


def _import_file(path: Path) -> ModuleType:
    """Run a file as a module, once; it may import what lies beside it."""
    path = path.resolve()
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    name = f"advised_{path.stem}"  # not the stem, which may be the name of another module
    if name in sys.modules and sys.modules[name].__file__ == str(path):
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is not a file of Python code: its name should end with .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses and compilers look for it
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _check_model(path: str, model: nn.Module) -> None:
    if hasattr(model, "_orig_mod"):
        raise UserError(f"{path} is compiled already: give the model without torch.compile, which is among the choices")
    devices = {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]} - {"cpu"}
    if devices:
        raise UserError(f"{path} is on {', '.join(sorted(devices))}: what is measured here is the CPU")


def describe_error(error: BaseException) -> str:
    """Type, message and place of an error in one line; the place is the last one outside of installed libraries."""
    message = " ".join(str(error).split())
    text = f"{type(error).__name__}: {message[:300]}" if message else type(error).__name__
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(("<", *_OWN)) and "site-packages" not in frame.filename
    ]
    frames = [frame for frame in frames if "importlib" not in Path(frame.filename).parts]
    return f"{text} ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else text


def _type_name(value: Any) -> str:
    return type(value).__qualname__
