"""Operators that stand in graphs in the place of public ones, with a weight in the order of the kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...ops.registry import NAMESPACE
from ..inductor.tables import register_lowering

_library = torch.library.Library(NAMESPACE, "FRAGMENT")


def define_internal_op(
    schema: str, *, body: Callable[..., Any], fake: Callable[..., Any], lower: Callable[..., Any]
) -> torch._ops.OpOverload:
    """Define an operator that stands in graphs in the place of another, and how Inductor lowers it.

    Others than Inductor use its table of decompositions too, and run what they get: its debugging backends, minifiers,
    :meth:`torch.export.ExportedProgram.run_decompositions`.

    Args:
        body: computes it by aten, usually as the decomposition of the other one, with the weight put back in order.
        fake: shapes, strides and dtypes of the result.
        lower: from Inductor IR to Inductor IR.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    overload = getattr(getattr(torch.ops, NAMESPACE), name).default
    register_lowering(overload, type_promotion_kind=None)(lower)
    return overload
