"""What may be done to a whole model, and the lines of code that do it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..perf.isolated import prepare_in_own_process
from ..perf.spec import Case, Job, Prepared
from .choices import (
    AS_IT_IS,
    BFLOAT16,
    CHANNELS_LAST,
    CONTIGUOUS,
    DTYPES,
    FLOAT32,
    IMAGE_BY_IMAGE,
    LAYOUTS,
    REPLACEMENTS,
    thread_numbers,
)
from .measure import Way
from .target import Input, Program, Target, output_tensors

COMPILE, FREEZE, ACCELERATE, FUSE = "compile", "freeze_weights", "accelerate_torchvision", "fuse_depthwise_separable"
OPTIONS, WINOGRAD = "inference_options", "use_winograd"
_NAMES = {
    COMPILE: "torch.compile",
    FREEZE: "freeze_weights()",  # with fold_norms(), which has no effect without
    OPTIONS: "inference_options()",
    ACCELERATE: "accelerate_torchvision()",
    FUSE: "fuse_depthwise_separable()",
    WINOGRAD: "use_winograd()",
}


@dataclasses.dataclass(frozen=True)
class Variant:
    """A model with some things done to it; the default is the model as it is.

    Attributes:
        compiler: which of torch.compile, options for it, and this package's calls that change what it does.
        layout: the memory format of weights and inputs, if it is not what it was.
        dtype: "bfloat16" by autocast, or "float32".
        batch: "image by image", if not in one call.
        threads: how many, if not as many as there are.
        replaced: pairs of a choice for single layers and the names of the layers for which it is made.
    """

    compiler: tuple[str, ...] = ()
    layout: str = ""
    dtype: str = ""
    batch: str = ""
    threads: int = 0
    replaced: tuple[tuple[str, tuple[str, ...]], ...] = ()

    @property
    def name(self) -> str:
        parts = [_NAMES[part] for part in self.compiler]
        parts += [part for part in (self.layout, self.dtype, self.batch) if part]
        parts += [f"{choice} in {_count(len(names), 'layer')}" for choice, names in self.replaced]
        parts += [_count(self.threads, "thread")] if self.threads else []
        return ", ".join(parts) or AS_IT_IS

    @property
    def compiles(self) -> bool:
        return bool(self.compiler) or any(REPLACEMENTS[choice].compiles for choice, _ in self.replaced)

    @property
    def changes_precision(self) -> bool:
        return bool(self.dtype) or any(choice in DTYPES for choice, _ in self.replaced)

    def what_changes(self) -> frozenset[str]:
        """Names of the attributes that are not the default; a variant with one of them changes one thing."""
        fields = (field.name for field in dataclasses.fields(self) if getattr(self, field.name) != field.default)
        return frozenset(fields)

    def with_(self, other: Variant) -> Variant:
        """Both at once; what both change becomes as in ``other``, but for layers, of which each has its own choice."""
        changed = {name: getattr(other, name) for name in other.what_changes()}
        if "replaced" in changed:
            changed["replaced"] = (*self.replaced, *other.replaced)
        return dataclasses.replace(self, **changed)

    def is_part_of(self, other: Variant) -> bool:
        """Whether the other does all that this one does, and more."""

        def included(name: str) -> bool:
            mine, theirs = getattr(self, name), getattr(other, name)
            return set(mine) <= set(theirs) if isinstance(mine, tuple) else mine == theirs

        return self != other and all(map(included, self.what_changes()))

    def goes_with(self, other: Variant) -> bool:
        """Whether both can be done at once: not two things to the same."""
        layers = [name for _, names in self.with_(other).replaced for name in names]
        both_change = self.what_changes() & other.what_changes() - {"replaced"}
        return not both_change and len(layers) == len(set(layers))


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number != 1)}"


def whole_model_variants(
    program: Program,
    threads: int,
    *,
    compiling: bool,
    calls_torchvision: bool,
    has_separable: bool,
    has_winograd: bool,
) -> list[Variant]:
    """What is worth measuring of a model as a whole, each by itself."""
    variants = []
    maps = [tensor for tensor in [*program.model.parameters(), *program.inputs] if tensor.dim() == 4]
    if maps:
        already = any(t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous() for t in maps)
        variants.append(Variant(layout=CONTIGUOUS if already else CHANNELS_LAST))
    dtypes = {tensor.dtype for tensor in [*program.model.parameters(), *program.inputs]}
    if dtypes & {torch.bfloat16, torch.float16}:
        variants.append(Variant(dtype=FLOAT32))
    elif torch.float32 in dtypes:
        variants.append(Variant(dtype=BFLOAT16))
    batches = {tensor.shape[0] for tensor in program.inputs}
    if len(batches) == 1 and 1 < batches.pop() <= 64:
        variants.append(Variant(batch=IMAGE_BY_IMAGE))
    variants += [Variant(threads=number) for number in thread_numbers(threads)]
    if compiling:
        variants += [Variant(compiler=(COMPILE,)), Variant(compiler=(COMPILE, FREEZE))]
        served = [ACCELERATE] * calls_torchvision + [FUSE] * has_separable + [WINOGRAD] * has_winograd
        variants += [Variant(compiler=(COMPILE, FREEZE, call)) for call in served]
        variants += [Variant(compiler=(COMPILE, FREEZE, *served))] if len(served) > 1 else []
        variants += [Variant(compiler=(COMPILE, FREEZE, OPTIONS, *served))]
    return variants


def way(variant: Variant, program: Program, target: Target, threads: int) -> Way:
    """A variant to measure.

    What compiles has a process of its own: accelerate_torchvision() and its like change what every later torch.compile
    of a process does, and Dynamo keeps what it compiled by code object, which all variants of a
    model share. What does not compile is measured here, on a copy of the model if it changes it.
    """
    threads = variant.threads or threads
    job = Job(Case("model", variant.name, target.load, 0.0), None, threads)

    def prepare_here() -> Prepared:
        changes = bool(variant.what_changes() - {"threads"})
        return _prepare(variant, dataclasses.replace(job, inputs=program.copy() if changes else program))

    def prepare_apart() -> Prepared:
        return prepare_in_own_process(functools.partial(_prepare, variant), job)

    return Way(
        variant.name,
        prepare_apart if variant.compiles else prepare_here,
        threads,
        low_precision=variant.changes_precision or _is_low(program),
        has_own_process=variant.compiles,
        prepare_apart=prepare_apart,
    )


def _is_low(program: Program) -> bool:
    return any(tensor.dtype in (torch.bfloat16, torch.float16) for tensor in program.model.parameters())


def _prepare(variant: Variant, job: Job) -> Prepared:
    call = build(variant, job.inputs)
    return Prepared(call, call())


def build(variant: Variant, program: Program) -> Callable[[], list[Tensor]]:
    """Do it: to this very model, which is not to be used for anything else then."""
    model = replace_layers(program.model, variant.replaced)
    inputs = program.inputs
    if variant.dtype == FLOAT32:
        model = model.float()
        inputs = tuple(input.float() if input.is_floating_point() else input for input in inputs)
    if variant.layout:
        model = model.to(memory_format=LAYOUTS[variant.layout])
    run: Callable[..., Any] = model
    if variant.compiler:
        import inductor_vision

        for name in _calls(variant.compiler):
            getattr(inductor_vision, name)()
        options = inductor_vision.inference_options() if OPTIONS in variant.compiler else None
        run = torch.compile(model, options=options)

    def call() -> list[Tensor]:
        with torch.no_grad(), _precision(variant.dtype):
            given = tuple(_in_layout(input, variant.layout) for input in inputs)
            return _one_by_one(run, given) if variant.batch else output_tensors(run(*given))

    return call


def replace_layers(model: nn.Module, replaced: Sequence[tuple[str, Sequence[str]]]) -> nn.Module:
    """Put other modules in the place of layers."""
    for choice, names in replaced:
        for name in names:
            model.set_submodule(name, REPLACEMENTS[choice].make(model.get_submodule(name)))
    return model


def _calls(compiler: Sequence[str]) -> list[str]:
    """This package's functions that change what is compiled, in the order in which they are called."""
    calls = [call for call in (ACCELERATE, FUSE, WINOGRAD) if call in compiler]
    return [*calls, "fold_norms", FREEZE] if FREEZE in compiler else calls


@contextlib.contextmanager
def _precision(dtype: str) -> Iterator[None]:
    if dtype != BFLOAT16:
        yield
        return
    with torch.autocast("cpu", dtype=torch.bfloat16):
        yield


def _in_layout(input: Tensor, layout: str) -> Tensor:
    return input.contiguous(memory_format=LAYOUTS[layout]) if layout and input.dim() == 4 else input


def _one_by_one(run: Callable[..., Any], inputs: Sequence[Tensor]) -> list[Tensor]:
    results = [output_tensors(run(*image)) for image in zip(*(input.split(1) for input in inputs))]
    return [torch.cat(of_images) for of_images in zip(*results)]


def code(variant: Variant, inputs: Sequence[Input]) -> list[str]:
    """Lines for a user to write, of a variable ``model`` and of its inputs, ``x`` or ``x1``, ``x2`` and so on."""
    names = ["x"] if len(inputs) == 1 else [f"x{number}" for number in range(1, len(inputs) + 1)]
    context = ["torch.no_grad()"]
    if variant.dtype == BFLOAT16:
        context.append('torch.autocast("cpu", dtype=torch.bfloat16)')
    body = [*_code_of_inputs(variant, dict(zip(names, inputs))), *_code_of_call(variant, names)]
    return [*_code_of_model(variant), f"with {', '.join(context)}:", *(f"    {line}" for line in body)]


def _code_of_model(variant: Variant) -> list[str]:
    lines = []
    calls = [f"inductor_vision.{name}()" for name in _calls(variant.compiler)]
    lines += ["import inductor_vision", *calls] if calls or OPTIONS in variant.compiler else []
    lines += [f"torch.set_num_threads({variant.threads})"] if variant.threads else []
    lines += ["from inductor_vision.advisor import replace"] if variant.replaced else []
    for choice, layers in variant.replaced:
        lines += textwrap.wrap(
            f"for name in {list(layers)}:",
            100,
            subsequent_indent=" " * 13,
            break_long_words=False,
            break_on_hyphens=False,
        )
        lines.append("    layer = model.get_submodule(name)")
        lines.append(f"    model.set_submodule(name, {REPLACEMENTS[choice].code})")
    lines += ["model = model.float()"] if variant.dtype == FLOAT32 else []
    lines += [f"model = model.to(memory_format={LAYOUTS[variant.layout]})"] if variant.layout else []
    if variant.compiler:
        options = ", options=inductor_vision.inference_options()" if OPTIONS in variant.compiler else ""
        lines.append(f"model = torch.compile(model{options})")
    return lines


def _code_of_inputs(variant: Variant, inputs: Mapping[str, Input]) -> list[str]:
    lines = []
    for name, input in inputs.items():
        change = ".float()" if variant.dtype == FLOAT32 and input.dtype.is_floating_point else ""
        if variant.layout and len(input.shape) == 4:
            change += f".contiguous(memory_format={LAYOUTS[variant.layout]})"
        lines += [f"{name} = {name}{change}"] if change else []
    return lines


def _code_of_call(variant: Variant, names: Sequence[str]) -> list[str]:
    if variant.batch:
        images = ", ".join(f"{name}.split(1)" for name in names)
        return [f"output = torch.cat([model(*image) for image in zip({images})])  # of each tensor that it returns"]
    return [f"output = model({', '.join(names)})"]
