"""AOTInductor packages run on whatever processor there is, and their weights are in memory twice.

The faults, seen in torch 2.13 to 2.15: where a package is loaded nobody looks whether the processor has the
instructions that it was compiled with, and the process ends at the first that is missing. And weights are copied out of
the file, whose pages stay in memory besides.

The way around: the functions of which whoever loads a package calls one first are ours. They ask the processor, and
either call Inductor's, and give the file's pages back then, or are an error. They are in the package itself, so they
are there for all who load it, in Python or C++, with or without this package.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from typing import Any

import torch

from ..common.template import splice_header
from .package_wrappers import method_exchanged

# Before and behind what Inductor writes, whose own functions get other names. The error is an exception, as these
# functions otherwise have only a code for it, and their callers do not ask for the last error.
_BEFORE = """
#include <torch/csrc/inductor/aoti_runtime/interface.h>
#define AOTInductorModelContainerCreateWithDevice inductor_create
extern "C" [[gnu::visibility("hidden")]] AOTIRuntimeError inductor_create(
    AOTInductorModelContainerHandle*, size_t, const char*, const char*);
#define AOTInductorModelContainerCreate inductor_create_on_device
extern "C" [[gnu::visibility("hidden")]] AOTIRuntimeError inductor_create_on_device(
    AOTInductorModelContainerHandle*, size_t, bool, const char*);
"""
_BEHIND = """
#undef AOTInductorModelContainerCreateWithDevice
#undef AOTInductorModelContainerCreate

PROCESSOR_H
FILE_PAGES_H

static_assert(std::is_array_v<decltype(_binary_constants_bin_start)>, "the weights, not a pointer to them");

extern "C" AOTI_API INDUCTOR_VISION_ANY_PROCESSOR AOTIRuntimeError AOTInductorModelContainerCreateWithDevice(
    AOTInductorModelContainerHandle* container, size_t models, const char* device, const char* cubins) {
  if (const char* why_not = inductor_vision::why_not_on_this_processor(COMPILED_FOR)) {
    throw std::runtime_error(why_not);
  }
  const AOTIRuntimeError error = inductor_create(container, models, device, cubins);
  inductor_vision::release_file_pages(_binary_constants_bin_start, _binary_constants_bin_end);
  return error;
}

extern "C" AOTI_API INDUCTOR_VISION_ANY_PROCESSOR AOTIRuntimeError AOTInductorModelContainerCreate(
    AOTInductorModelContainerHandle* container, size_t models, bool is_cpu, const char* cubins) {
  if (const char* why_not = inductor_vision::why_not_on_this_processor(COMPILED_FOR)) {
    throw std::runtime_error(why_not);
  }
  const AOTIRuntimeError error = inductor_create_on_device(container, models, is_cpu, cubins);
  inductor_vision::release_file_pages(_binary_constants_bin_start, _binary_constants_bin_end);
  return error;
}
"""


def processor_checked() -> contextlib.AbstractContextManager[None]:
    """Within this context what is packaged refuses to be loaded where the processor lacks what it is compiled for.

    Raises:
        RuntimeError: Inductor generates packages otherwise than the releases of torch that this is tested with.
    """
    return method_exchanged("_write_aoti_interface_header", _around_interface, "a package that looks at the processor")


def _around_interface(original: Callable[..., None]) -> Callable[..., None]:
    def write(wrapper: Any) -> None:
        wrapper.header.splice_aot(_BEFORE)
        original(wrapper)
        behind = _BEHIND.replace("PROCESSOR_H", splice_header("processor.h"))
        behind = behind.replace("FILE_PAGES_H", splice_header("file_pages.h"))
        wrapper.header.splice_aot(behind.replace("COMPILED_FOR", json.dumps(_compiled_for())))

    return write


def _compiled_for() -> str:
    """The kind of processors, in not too many words (cpp/processor.h)."""
    from ..inductor.tables import config

    if config.cpp.march:
        return config.cpp.march[:100]
    name = torch.cpu.get_capabilities().get("cpu_name", "")[:100]
    return f"the processor that it was made on, {name}" if name else "the processor that it was made on"
