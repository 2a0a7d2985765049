"""Reads Python and C by their syntax: modules, imports, circles, comments (`tests.structure`).

May import only the standard library.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

_CALLABLES = {"Callable", "Awaitable", "Coroutine"}
_PRAGMA = re.compile(r"#:?\s*(noqa|type:|fmt:|pragma|mypy:|ruff:)|#\s*---|#!")
_NO_CODE = (
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
)
_C_COMMENT = re.compile(r'/\*.*?\*/|//[^\n]*|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'', re.DOTALL)
_C_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)
_C_FUNCTION = re.compile(r"^(?!typedef)(\w[\w \t*]*?)\b(\w+)\([^;{}]*\)\s*\{", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    """A Python file.

    Attributes:
        path: within the checkout.
        names: of classes and functions, by node, with what they are in.
    """

    name: str
    path: Path
    text: str
    tree: ast.Module
    names: Mapping[ast.AST, str]

    @property
    def package(self) -> str:
        """What relative imports start from."""
        return self.name if self.path.name == "__init__.py" else self.name.rpartition(".")[0]


def read_modules(root: Path, parts: Sequence[str]) -> dict[str, Module]:
    """All modules below some folders of a checkout, by name."""
    found = {}
    for part in parts:
        top = root / part
        for file in sorted(top.rglob("*.py")):
            words = (top.name, *file.relative_to(top).with_suffix("").parts)
            name = ".".join(words).removesuffix(".__init__")
            text = file.read_text()
            tree = ast.parse(text, str(file))
            path = file.relative_to(root)
            found[name] = Module(name=name, path=path, text=text, tree=tree, names=_names(tree))
    return found


def _names(tree: ast.Module) -> dict[ast.AST, str]:
    found: dict[ast.AST, str] = {}

    def visit(node: ast.AST, before: str) -> None:
        for child in ast.iter_child_nodes(node):
            within = before
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                found[child] = before + child.name
                within = f"{before}{child.name}."
            visit(child, within)

    visit(tree, "")
    return found


def qualified(module: Module, node: ast.AST) -> str:
    """``meshnet.module:Class.method``."""
    return f"{module.name}:{module.names[node]}"


# --- classes and parameters ----------------------------------------------------------------------


def parameters(
    function: ast.FunctionDef | ast.AsyncFunctionDef,
) -> list[tuple[str, ast.expr | None]]:
    """Name and annotation of a method's parameters, less the first."""
    given = function.args
    listed = [*given.posonlyargs, *given.args][1:] + given.kwonlyargs
    listed += [star for star in (given.vararg, given.kwarg) if star is not None]
    return [(one.arg, one.annotation) for one in listed]


def is_dataclass(cls: ast.ClassDef, *, frozen: bool) -> bool:
    """Whether a class is a dataclass, and frozen or not."""
    for decorator in cls.decorator_list:
        words = decorator.keywords if isinstance(decorator, ast.Call) else []
        name = decorator.func if isinstance(decorator, ast.Call) else decorator
        if ast.unparse(name).split(".")[-1] == "dataclass":
            is_frozen = any(w.arg == "frozen" and ast.unparse(w.value) == "True" for w in words)
            return is_frozen is frozen
    return False


def callable_names(modules: Mapping[str, Module]) -> set[str]:
    """Names that stand for something to call, in any module."""
    found = set(_CALLABLES)
    while True:
        more = {
            name
            for module in modules.values()
            for node in ast.walk(module.tree)
            for name in _callable_name(node, found)
        }
        if more <= found:
            return found
        found |= more


def _callable_name(node: ast.AST, known: set[str]) -> Iterator[str]:
    if isinstance(node, ast.ClassDef):
        methods = [n.name for n in node.body if isinstance(n, ast.FunctionDef)]
        asyncs = [n.name for n in node.body if isinstance(n, ast.AsyncFunctionDef)]
        is_protocol = any("Protocol" in ast.unparse(base) for base in node.bases)
        if is_protocol and methods + asyncs == ["__call__"]:
            yield node.name
    elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        # An alias is a subscript or another one's name, of a name that begins with a capital.
        value, name = node.value, node.targets[0].id
        head = value.value if isinstance(value, ast.Subscript) else value
        words = ast.unparse(head).split(".") if isinstance(head, ast.Name | ast.Attribute) else [""]
        if words[-1] in known and name.lstrip("_")[:1].isupper():
            yield name


def literal_constants(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Upper-case names of a module and their values, of those that have no name in their value."""
    for node in tree.body:
        if isinstance(node, ast.Assign):
            targets, value = node.targets[0], node.value
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            targets, value = node.target, node.value
        else:
            continue
        pairs = [(targets, value)]
        if isinstance(targets, ast.Tuple) and isinstance(value, ast.Tuple):
            pairs = list(zip(targets.elts, value.elts, strict=False))
        for target, given in pairs:
            is_literal = not any(isinstance(n, ast.Name | ast.Call) for n in ast.walk(given))
            name = target.id if isinstance(target, ast.Name) else ""
            if name.isupper() and is_literal and name != "TYPE_CHECKING":
                yield name, ast.unparse(given)


# --- imports and circles -------------------------------------------------------------------------


def imports_of(module: Module, modules: Mapping[str, Module], *, for_types: bool) -> set[str]:
    """Modules, of the given ones, that a module imports, also within functions.

    Args:
        for_types: also what only type checkers import.
    """
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in (*(node.body if for_types else ()), *node.orelse):
                visit(child)
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                words = module.package.split(".")
                upwards = words[: len(words) - node.level + 1]
                base = ".".join([*upwards, *([base] if base else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add(inner if inner in modules else base)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(module.tree)
    return {name for name in found if name in modules and name != module.name}


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Sets of nodes that are reached from each other, the largest first (Tarjan's algorithm)."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        order[node] = lowest[node] = len(order)
        stack.append(node)
        for after in sorted(graph.get(node, ())):
            if after not in order:
                visit(after)
                lowest[node] = min(lowest[node], lowest[after])
            elif after in stack:
                lowest[node] = min(lowest[node], order[after])
        if lowest[node] == order[node]:
            at = stack.index(node)
            if len(stack) - at > 1:
                found.append(sorted(stack[at:]))
            del stack[at:]

    for node in sorted(graph):
        if node not in order:
            visit(node)
    return sorted(found, key=lambda circle: (-len(circle), circle))


def c_graph(files: Sequence[Path]) -> tuple[dict[str, set[str]], dict[str, set[str]]]:
    """Which C file calls functions of which, and which includes which.

    A header counts as the C file of its name for what it calls; what is called by a pointer, or in
    a macro, is not seen.
    """
    texts = {file.name: file.read_text() for file in files}
    plain = {name: _C_COMMENT.sub(" ", text) for name, text in texts.items()}
    defined: dict[str, str] = {}
    for name, text in plain.items():
        for head, function in _C_FUNCTION.findall(text):
            if "static" not in head.split():
                defined[function] = name
    calls: dict[str, set[str]] = {}
    for name, text in plain.items():
        called = {defined[word] for word in re.findall(r"\b(\w+)\s*\(", text) if word in defined}
        if name.endswith(".c"):
            calls[name] = called - {name}
    includes = {n: set(_C_INCLUDE.findall(text)) & texts.keys() for n, text in texts.items()}
    return calls, includes


# --- comments ------------------------------------------------------------------------------------


def comments_and_code_lines(text: str) -> tuple[int, int]:
    """Runs of comment lines, and lines of code: neither blank, nor comment, nor docstring."""
    code: set[int] = set()
    comments = 0
    last_comment = -1
    docstrings = {
        line
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        line = token.start[0]
        if token.type == tokenize.COMMENT and not _PRAGMA.match(token.string):
            alone = token.line.strip().startswith("#")
            comments += not (alone and last_comment == line - 1)
            last_comment = line if alone else -1
        elif token.type not in _NO_CODE:
            code.update(range(line, token.end[0] + 1))
    return comments, len(code - docstrings)
