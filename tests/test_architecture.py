"""What may import what, as docs/architecture.md has it: arrows go one way, and Inductor's private parts have one door.

Imports inside of functions count as others do. Those for type checkers alone do not, and neither do modules that are
imported by a name that is computed: that is how lowering/common/registry.py finds those that declare templates to it.
"""

from __future__ import annotations

import ast
import graphlib
import pathlib
import re
from collections.abc import Iterator

import inductor_vision
import pytest

ROOT = pathlib.Path(inductor_vision.__file__).parent
NOT_INSTALLED = ("tests", "examples", "docs")


def sources() -> dict[str, pathlib.Path]:
    """The package's modules by their names, "" being the package itself."""
    files = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))
    ours = [path for path in files if path.parts[0] not in NOT_INSTALLED and not path.parts[0].startswith(".")]
    packages = [path for path in ours if all((ROOT / folder / "__init__.py").exists() for folder in path.parents)]
    return {".".join(path.with_suffix("").parts).removesuffix("__init__").rstrip("."): ROOT / path for path in packages}


SOURCES = sources()


def imports_of(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    if isinstance(tree, ast.If) and "TYPE_CHECKING" in ast.unparse(tree.test):
        return
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        yield from imports_of(node)


def imported_by(name: str) -> set[str]:
    """The package's own modules that a module imports."""
    path, found = SOURCES[name], set()
    package = ("inductor_vision", *path.relative_to(ROOT).parts[:-1])
    for node in imports_of(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported = [(alias.name, alias.name) for alias in node.names]
        else:
            base = package[: len(package) - node.level + 1] if node.level > 0 else ()
            module = ".".join([*base, *filter(None, [node.module])])
            imported = [(f"{module}.{alias.name}", module) for alias in node.names]
        for candidates in imported:  # a module of that name, or else something in the module
            ours = [full.partition(".")[2] for full in candidates if full.partition(".")[0] == "inductor_vision"]
            found |= {next((module for module in ours if module in SOURCES), ours[-1])} if ours else set()
    assert found <= SOURCES.keys(), (name, found - SOURCES.keys())
    return found - {name}


IMPORTS = {name: imported_by(name) for name in SOURCES}


def room(name: str) -> str:
    """The folder of a module; modules in the root are rooms of their own."""
    return ".".join(name.split(".")[:-1]) if SOURCES[name].name != "__init__.py" and "." in name else name


def rooms() -> dict[str, set[str]]:
    """All packages but benchmarks, whose command stands beside what its suites are made of."""
    edges: dict[str, set[str]] = {}
    for name, others in IMPORTS.items():
        if name.startswith("perf"):
            continue
        edges.setdefault(room(name), set()).update({room(other) for other in others} - {room(name)})
    return edges


def circle(edges: dict[str, set[str]]) -> list[str] | None:
    try:
        graphlib.TopologicalSorter(edges).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return None


def test_what_is_looked_at():
    assert {"", "ops.regions", "lowering.nms", "lowering.passes.depthwise_separable", "perf.runner"} <= SOURCES.keys()
    assert "lowering.common.registry" in IMPORTS["lowering.nms"]
    assert "lowering.passes.depthwise_separable" in IMPORTS["lowering.installation.installer"]  # inside of a function
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) is not None


def test_no_module_imports_itself_by_way_of_others():
    assert circle(IMPORTS) is None


def test_no_folder_imports_itself_by_way_of_others():
    assert circle(rooms()) is None


def test_the_operators_know_nothing_of_their_lowerings():
    assert not [other for other in rooms()["ops"] if other.startswith(("lowering", "integrations"))]


def test_every_folder_is_installed():
    """A module that a wheel lacks is missed only where it is imported from there."""
    (listed,) = re.findall(r"^packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)
    folders = {name for name, path in SOURCES.items() if path.name == "__init__.py"}
    assert {f"inductor_vision.{name}".rstrip(".") for name in folders} == set(re.findall(r'"([\w.]+)"', listed))


# Besides the folder that is there for it.
MAY_IMPORT_INDUCTOR = {
    "explain": "reports what could not be imported, and so must not need it",
    "integrations.models": "a setting, as a user would make it",
    "perf.backends": "settings of a contender, as a user would make them",
    "perf.one_image": "settings of a contender, as a user would make them",
}


@pytest.mark.parametrize("name", [name for name in SOURCES if not name.startswith("lowering.inductor")])
def test_private_parts_of_inductor_have_one_door(name: str):
    private = set()
    for node in imports_of(ast.parse(SOURCES[name].read_text())):
        names = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{imported}" for imported in names] if node.level == 0 else []
        private |= {imported for imported in names if imported.startswith("torch._inductor")}
    assert bool(private) == (name in MAY_IMPORT_INDUCTOR), f"import {private} by way of lowering/inductor/"
