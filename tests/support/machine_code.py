"""What the machine code of a package consists of."""

from __future__ import annotations

import pathlib
import platform
import re
import shutil
import subprocess
import tempfile
import zipfile

import pytest
from inductor_vision.tests.support.cpp import HEADERS

only_for_x86_64 = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason=f"for x86-64, this machine is {platform.machine()}"
)

# Headers that are compiled beforehand serve packages of the same instructions.
ONE_PACKAGE = {"aot_inductor.precompile_headers": False}
# For a package that no processor can run: AMD's of 2015 had instructions that none had before or has had since.
OF_NO_PROCESSOR = {"cpp.march": "bdver4", "cpp.simdlen": 256, "aot_inductor.debug_compile": True, **ONE_PACKAGE}

_AVX512 = r"%zmm|%[xy]mm(1[6-9]|2\d|3[01])\b|%k[1-7]\b"
_VECTORS = {"x86-64-v2": r"%xmm", "x86-64-v3": r"%ymm", "x86-64-v4": r"%zmm"}
_MISSING = {
    "x86-64-v2": rf"%ymm|{_AVX512}|\tv[a-z0-9]+ .*%xmm|\t(andn|shlx|sarx|shrx|rorx|mulx|pdep|pext|lzcnt|movbe)[lq]? ",
    "x86-64-v3": _AVX512,
    "x86-64-v4": r"\t(vpdp|vdpbf16|vcvtne|vpmadd52|vpopcnt|vperm\w*b |vp(compress|expand)[bw]|vpsh[lr]d|tdp|tile)",
}


# What a package looks for in the processor, which is what its compiler was allowed to use.
_V2 = {"sse4.2", "popcnt"}
_V3 = {*_V2, "avx", "avx2", "fma", "f16c", "bmi", "bmi2", "lzcnt", "movbe"}
_FEATURES = {
    "x86-64-v2": _V2,
    "x86-64-v3": _V3,
    "x86-64-v4": {*_V3, *(f"avx512{x}" for x in ("f", "bw", "cd", "dq", "vl"))},
}


def assert_made_for(target: str, package: pathlib.Path) -> None:
    """It has the vectors of that level, and no instruction that is not of the level."""
    if not shutil.which("objdump"):
        pytest.skip("objdump is not installed")
    with zipfile.ZipFile(package) as archive, tempfile.TemporaryDirectory() as folder:
        (name,) = (name for name in archive.namelist() if name.endswith(".so"))
        command = ["objdump", "-d", "--no-show-raw-insn", archive.extract(name, folder)]
        code = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        library = archive.read(name)
    known = re.findall(r'_LACKS\("(.+?)"\)', (HEADERS / "processor.h").read_text())
    looked_for = {feature for feature in known if f"\0 {feature}\0".encode() in library}
    assert looked_for == _FEATURES[target], looked_for
    assert re.search(_VECTORS[target], code), f"no {_VECTORS[target]}"
    _assert_lacks(_MISSING[target], code)
    # What runs before the processor was looked at is for any: constructors, and the function that all loaders call.
    for name in ("_GLOBAL__sub_I", "why_not_on_this_processor", "ModelContainerCreateWithDevice"):
        early = re.findall(rf"^[0-9a-f]+ <[^>]*{name}[^>]*>:\n(.*?)^$", code, re.MULTILINE | re.DOTALL)
        assert early, f"no {name}"
        _assert_lacks(_MISSING["x86-64-v2"], "".join(early))


def _assert_lacks(pattern: str, code: str) -> None:
    foreign = [line for line in code.splitlines() if re.search(pattern, line)]
    assert not foreign, "\n".join(foreign[:10])
