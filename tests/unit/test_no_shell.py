"""No shell ever gets a command to interpret: checked in the source of every module."""

from __future__ import annotations

import ast
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

_ROOT = Path(__file__).parents[2]
_MODULES = sorted(path for part in ("meshnet", "agent") for path in (_ROOT / part).rglob("*.py"))
_SHELLS = {"sh", "bash", "dash", "ash", "zsh", "ksh", "busybox", "env", "eval"}
_FORBIDDEN = {
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"),
    *("asyncio.create_subprocess_shell", "pty.spawn"),
}
_STARTERS = {
    *("run", "Popen", "call", "check_call", "check_output", "run_process", "open_process"),
    *("partial", "popen", "spawn"),
}
_PRINTS_A_SCRIPT = "argcomplete.shellcode"
"""It prints a script for people to source; its argument `shell` is a name."""
_GATES = (
    ("meshnet/lab/host.py", "_GATE"),
    ("meshnet/runtime/engine/oci_runtime.py", "_HIDE_UNIFIED"),
)
"""The exceptions: the lab's containers wait for a line before they become their command, and crun
gets its view of the cgroups first.  The script is a constant, and the command is its arguments,
which no shell reads."""


def offences(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """List the line and the reason of every call that could reach a shell."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in _FORBIDDEN or name.rpartition(".")[2] in {"system", "getoutput"}:
                yield node.lineno, name
            for keyword in node.keywords:
                if name == _PRINTS_A_SCRIPT:
                    continue
                if keyword.arg == "shell" and ast.unparse(keyword.value) != "False":
                    yield node.lineno, f"{name}(shell={ast.unparse(keyword.value)})"
                if keyword.arg == "executable":
                    yield node.lineno, f"{name}(executable=…)"
            if name.rpartition(".")[2] in _STARTERS and node.args:
                first = node.args[0]
                if isinstance(first, ast.JoinedStr) or _is_text(first, " "):
                    yield node.lineno, f"{name}({ast.unparse(first)})"
        elif isinstance(node, ast.List | ast.Tuple):
            words = node.elts
            for word, after in pairwise(words):
                if _is_shell(word) and isinstance(after, ast.Constant) and after.value == "-c":
                    yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.ImportFrom) and node.module in {"os", "subprocess"}:
            for alias in node.names:
                if f"{node.module}.{alias.name}" in _FORBIDDEN:
                    yield node.lineno, f"from {node.module} import {alias.name}"


def _is_shell(node: ast.expr) -> bool:
    return (
        isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and node.value.rpartition("/")[2] in _SHELLS
    )


def _is_text(node: ast.expr, within: str) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and within in node.value


def test_no_module_uses_a_shell() -> None:
    assert len(_MODULES) > 100
    found = [
        (str(path.relative_to(_ROOT)), reason)
        for path in _MODULES
        for _, reason in offences(ast.parse(path.read_text()))
    ]
    gates = [(file, name) for file, name in _GATES for path, why in found
             if path == file and name in why]  # fmt: skip
    assert len(found) == len(gates), found
    assert sorted(gates) == sorted(_GATES)


@pytest.mark.parametrize(("file", "name"), _GATES)
def test_a_gate_is_a_constant_that_quotes_its_arguments(file: str, name: str) -> None:
    tree = ast.parse((_ROOT / file).read_text())
    (script,) = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name
    ]
    assert isinstance(script, ast.Constant)
    assert '"$@"' in str(script.value)


@pytest.mark.parametrize(
    "source",
    [
        "os.system('ls')",
        "import os as o; o.system(x)",
        "subprocess.run(['ls'], shell=True)",
        "subprocess.Popen(command, shell=maybe)",
        "trio.run_process(['sh', '-c', command])",
        "host.run(('/bin/bash', '-c', f'ip link del {name}'))",
        "argv = [*enter, *('sh', '-c', text)]",
        "subprocess.run(f'ip link del {name}')",
        "subprocess.run('ls -l')",
        "from os import popen",
        "subprocess.run(argv, executable='/bin/sh')",
    ],
)
def test_every_way_to_a_shell_is_seen(source: str) -> None:
    assert list(offences(ast.parse(source)))


@pytest.mark.parametrize(
    "source",
    [
        "subprocess.run(['ip', 'link'], check=False)",
        "subprocess.run(argv, shell=False)",
        "completion = ('bash', 'zsh')",
        "conmon(['-c', identity])",
    ],
)
def test_what_is_no_shell_is_left_alone(source: str) -> None:
    assert not list(offences(ast.parse(source)))
