#!/usr/bin/env bash
# Build run.cpp against the libraries of an installed torch:
#
#     python examples/export.py                 # makes out/model.pt2
#     examples/cpp/build.sh out/run             # makes out/run
#     out/run out/model.pt2 --shape 4x3x224x320 --threads 2
#
# PYTHON is the interpreter that has torch (default: .venv/bin/python where `make` made it, else python3); it is asked
# where torch is, and is needed no longer once the program is built. CXX is the compiler (default: g++).
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
output=${1:-out/run}
python=$here/../../.venv/bin/python
[[ -x $python ]] || python=python3
python=${PYTHON:-$python}

# One option per line, so that a folder's name may hold spaces.
options=$("$python" - <<'END'
import pathlib
import torch
from torch.utils.cpp_extension import include_paths

libraries = pathlib.Path(torch.__file__).parent / "lib"
print(f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}")
for path in include_paths():
    print(f"-isystem{path}")
print(f"-L{libraries}", f"-Wl,-rpath,{libraries}", sep="\n")
END
) || { echo "build.sh: $python cannot import torch; name another interpreter with PYTHON=..." >&2; exit 1; }
mapfile -t options <<<"$options"

mkdir -p "$(dirname "$output")"
"${CXX:-g++}" -std=c++20 -O2 -Wall -Wextra "$here/run.cpp" -o "$output" "${options[@]}" -ltorch_cpu -lc10
echo "built $output"
