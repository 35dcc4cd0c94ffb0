"""Values of the kernels' structs in generated code: whether each member is told by its name, in the declared order."""

from __future__ import annotations

import functools
import re

from inductor_vision.tests.support.cpp import HEADERS


@functools.cache
def declared() -> dict[str, list[str]]:
    """The members of each struct in the kernels' headers."""
    structs = {}
    for header in HEADERS.glob("*.h"):
        text = re.sub(r" *//.*", "", header.read_text())
        for name, body in re.findall(r"^struct (\w+) \{\n(.*?)^\};", text, flags=re.MULTILINE | re.DOTALL):
            lines = re.findall(r"^  (?!using |static )(\S[^(){}=\n]+;)$", body, flags=re.MULTILINE)
            structs[name] = [member for line in lines for member in re.findall(r"(\w+)(?=[,;])", line)]
    return structs


def told(text: str) -> list[str]:
    """The members of the value that begins after an opening brace."""
    depth, members = 1, []
    for token in re.finditer(r"[{}]|\.(\w+) = ", text):
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if depth == 0:
            break
        if depth == 1 and token[1]:
            members.append(token[1])
    return members


def emitted(source: str) -> list[tuple[str, list[str]]]:
    """Every value of a struct in generated code: which struct, and the members that are told."""
    found = re.finditer(r"inductor_vision::(\w+)(?:<[^<>(){};]*>)?\{", source)
    return [(match[1], told(source[match.end() :])) for match in found if match[1] in declared()]


def assert_told_by_name(source: str) -> None:
    for struct, members in emitted(source):
        assert members == declared()[struct], f"of {struct}, {members} are told"
