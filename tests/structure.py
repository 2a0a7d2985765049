"""Measures how a checkout is built, from its syntax alone, and prints it beside another checkout.

    python -m tests.structure [ROOT] [--compare OLDROOT] [--details]

What counts as what:

files         ``.py``, ``.c`` and ``.h``, ``__init__.py`` and ``__main__.py`` among them, directly
              in a folder
function      from ``def`` to its last line, docstring and functions inside included; Python only
constructor   an ``__init__`` that is written out, or a dataclass that is not frozen and has
              methods; its parameters less self, a starred one is one.  Values (frozen dataclasses,
              tuples, structs) are none
callable      a parameter whose annotation has Callable, Awaitable or Coroutine in it, a name that
              stands for such, or a protocol that has nothing but ``__call__``
circle        modules that import each other, however far around; imports within functions count,
              those for types alone are looked at once more with all others.  What a package's
              ``__init__`` is imported for by importing a module in it does not count
mode named    ``Mode.X``, or a literal that is a mode's value, outside ``meshnet/backends/X.py`` (or
              a folder X) and the list of the modes; some literals mean a link or a protocol
comment       a run of comment lines, or one at a line's end; not pragmas, not headings of sections
constant      of a module, upper case, with or without an underscore before, of one literal value

May import only the standard library and `tests.syntax`.
"""

from __future__ import annotations

import argparse
import ast
import math
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tests.syntax import (
    Module,
    c_graph,
    callable_names,
    circles,
    comments_and_code_lines,
    imports_of,
    is_dataclass,
    literal_constants,
    parameters,
    qualified,
    read_modules,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

PRODUCT = ("agent/meshnet_agent", "meshnet")
TESTS = ("tests",)
SUFFIXES = (".py", ".c", ".h")
BACKENDS = Path("meshnet/backends")


@dataclass(frozen=True, slots=True, order=True)
class Named:
    """A number, and what it measures."""

    number: int
    name: str

    def __str__(self) -> str:
        return f"{self.number}  {self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Of a part of the checkout; each list has the largest first.

    Attributes:
        folders: how many source files each has.
        files: lines of each.
        functions: lines of each.
    """

    folders: Sequence[Named]
    files: Sequence[Named]
    functions: Sequence[Named]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measures:
    """The measures of a checkout.

    Attributes:
        constructors: parameters of each, the most first.
        callables: names of parameters that are callables, by class with a constructor.
        value_callables: the same for frozen dataclasses, whose fields do not count as parameters.
        import_circles: modules that import each other when they run.
        type_circles: the same with imports for types, where that makes more of it.
        c_circles: files of the native engine that call each other.
        c_include_circles: files of it that include each other.
        mode_names, mode_literals: places (``FILE:LINE NAME``) outside a mode's backend.
        comments, code_lines, lines: of the product's Python; `lines` are all that there are.
        twice: modules that have the same constant, by name and value.
    """

    product: Sizes
    tests: Sizes
    constructors: Sequence[Named]
    callables: dict[str, list[str]]
    value_callables: dict[str, list[str]]
    import_circles: list[list[str]]
    type_circles: list[list[str]]
    c_circles: list[list[str]]
    c_include_circles: list[list[str]]
    mode_names: list[str]
    mode_literals: list[str]
    comments: int
    code_lines: int
    lines: int
    twice: dict[str, list[str]]

    @property
    def constructor_p90(self) -> int:
        """The number of parameters that nine of ten constructors do not exceed (nearest rank)."""
        numbers = sorted(c.number for c in self.constructors)
        return numbers[math.ceil(0.9 * len(numbers)) - 1] if numbers else 0

    def comments_per_100(self, lines: int) -> float:
        """Comments for each 100 of so many lines, `code_lines` or `lines`."""
        return round(100 * self.comments / max(1, lines), 2)


def measure(root: Path) -> Measures:
    """Measure a checkout.

    Raises:
        SyntaxError: a Python file of it is not valid Python.
    """
    modules = read_modules(root, PRODUCT)
    aliases = callable_names(modules)
    callables, value_callables = _callables(modules, aliases)
    runtime = {m.name: imports_of(m, modules, for_types=False) for m in modules.values()}
    everything = {m.name: imports_of(m, modules, for_types=True) for m in modules.values()}
    import_circles = circles(runtime)
    calls, includes = c_graph(sorted((root / "meshnet").rglob("*.[ch]")))
    counts = [comments_and_code_lines(m.text) for m in modules.values()]
    mode_names, mode_literals = _mode_places(modules)
    return Measures(
        product=_sizes(root, PRODUCT),
        tests=_sizes(root, TESTS),
        constructors=_largest(
            Named(len(found), qualified(module, cls))
            for module, cls, found in _constructors(modules)
        ),
        callables=callables,
        value_callables=value_callables,
        import_circles=import_circles,
        type_circles=[c for c in circles(everything) if c not in import_circles],
        c_circles=circles(calls),
        c_include_circles=circles(includes),
        mode_names=mode_names,
        mode_literals=mode_literals,
        comments=sum(comments for comments, _ in counts),
        code_lines=sum(lines for _, lines in counts),
        lines=sum(len(m.text.splitlines()) for m in modules.values()),
        twice=_twice(modules),
    )


def _largest(found: Iterable[Named]) -> list[Named]:
    return sorted(found, key=lambda item: (-item.number, item.name))


def _sizes(root: Path, parts: Sequence[str]) -> Sizes:
    files = [p for part in parts for p in sorted((root / part).rglob("*")) if p.suffix in SUFFIXES]
    folders = Counter(str(p.parent.relative_to(root)) for p in files)
    functions = [
        Named((node.end_lineno or node.lineno) - node.lineno + 1, qualified(module, node))
        for module in read_modules(root, parts).values()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    return Sizes(
        folders=_largest(Named(n, folder) for folder, n in folders.items()),
        files=_largest(
            Named(len(p.read_text().splitlines()), str(p.relative_to(root))) for p in files
        ),
        functions=_largest(functions),
    )


# --- constructors --------------------------------------------------------------------------------


def _classes(modules: dict[str, Module]) -> Iterator[tuple[Module, ast.ClassDef]]:
    for module in modules.values():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ClassDef):
                yield module, node


def _constructors(
    modules: dict[str, Module],
) -> Iterator[tuple[Module, ast.ClassDef, list[tuple[str, ast.expr | None]]]]:
    for module, cls in _classes(modules):
        methods = [n for n in cls.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
        init = next((m for m in methods if m.name == "__init__"), None)
        if init is not None:
            yield module, cls, parameters(init)
        elif methods and is_dataclass(cls, frozen=False):
            yield module, cls, _fields(cls)


def _fields(cls: ast.ClassDef) -> list[tuple[str, ast.expr | None]]:
    return [
        (node.target.id, node.annotation)
        for node in cls.body
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and "ClassVar" not in ast.unparse(node.annotation)
        and not (node.value is not None and "init=False" in ast.unparse(node.value))
    ]


def _callables(
    modules: dict[str, Module], aliases: set[str]
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    def those(found: list[tuple[str, ast.expr | None]]) -> list[str]:
        return [n for n, annotation in found if annotation is not None and is_one(annotation)]

    def is_one(annotation: ast.expr) -> bool:
        if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
            annotation = ast.parse(annotation.value, mode="eval").body
        return any(
            (isinstance(n, ast.Name) and n.id in aliases)
            or (isinstance(n, ast.Attribute) and n.attr in aliases)
            for n in ast.walk(annotation)
        )

    taken = {qualified(m, c): those(found) for m, c, found in _constructors(modules)}
    values = {
        qualified(m, c): those(_fields(c))
        for m, c in _classes(modules)
        if is_dataclass(c, frozen=True)
    }
    return {c: n for c, n in taken.items() if n}, {c: n for c, n in values.items() if n}


# --- modes, constants ----------------------------------------------------------------------------


def _modes(modules: dict[str, Module]) -> tuple[set[int], dict[str, str]]:
    """Ids of the nodes that define the modes, and the modes' values by their names.

    Raises:
        LookupError: the enumeration does not exist.
    """
    for _, cls in _classes(modules):
        if cls.name == "Mode" and any("Enum" in ast.unparse(base) for base in cls.bases):
            members = [
                (node.targets[0].id, node.value)
                for node in cls.body
                if isinstance(node, ast.Assign)
                and isinstance(node.targets[0], ast.Name)
                and isinstance(node.value, ast.Constant)
            ]
            own = {id(value) for _, value in members}
            return own, {name: str(value.value) for name, value in members}
    raise LookupError("no enumeration Mode is left to look for")


def _mode_places(modules: dict[str, Module]) -> tuple[list[str], list[str]]:
    own, values = _modes(modules)
    names: list[str] = []
    literals: list[str] = []
    for module in modules.values():
        for node in ast.walk(module.tree):
            if (
                isinstance(node, ast.Attribute)
                and node.attr in values
                and ast.unparse(node.value).split(".")[-1] == "Mode"
            ):
                place, value = names, values[node.attr]
            elif (
                isinstance(node, ast.Constant)
                and node.value in values.values()
                and id(node) not in own
            ):
                place, value = literals, str(node.value)
            else:
                continue
            if not _is_backend_of(value, module.path):
                place.append(f"{module.path}:{node.lineno} {value}")
    return sorted(names), sorted(literals)


def _is_backend_of(mode: str, path: Path) -> bool:
    """Whether a file is a mode's backend, or in the folder of it."""
    if not path.is_relative_to(BACKENDS):
        return False
    return path.relative_to(BACKENDS).parts[0].removesuffix(".py") == mode.replace("-", "_")


def _twice(modules: dict[str, Module]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for module in modules.values():
        for name, value in literal_constants(module.tree):
            found[f"{name.lstrip('_')} = {value}"].append(module.name)
    return {constant: sorted(where) for constant, where in sorted(found.items()) if len(where) > 1}


# --- the table -----------------------------------------------------------------------------------


def rows(found: Measures) -> list[tuple[str, str]]:
    """What the table says of a checkout: a line's head, and its value."""
    most = found.constructors[0] if found.constructors else Named(0, "")
    callables = sum(map(len, found.callables.values()))
    mode_files = {place.partition(":")[0] for place in found.mode_names}
    literal_files = {place.partition(":")[0] for place in found.mode_literals}
    return [
        ("files in the largest folder", str(found.product.folders[0])),
        ("lines of the longest file", str(found.product.files[0])),
        ("files of more than 400 lines", str(_above(found.product.files, 400))),
        ("lines of the longest function", str(found.product.functions[0])),
        ("functions of more than 60 lines", str(_above(found.product.functions, 60))),
        ("constructor parameters, p90", str(found.constructor_p90)),
        ("constructor parameters, most", str(most)),
        ("constructors of more than 7", str(_above(found.constructors, 7))),
        ("callables among all of them", f"{callables} in {len(found.callables)} classes"),
        (
            "callables in frozen dataclasses",
            f"{sum(map(len, found.value_callables.values()))} in {len(found.value_callables)}",
        ),
        ("import circles", _shape(found.import_circles)),
        ("more with imports for types", _shape(found.type_circles)),
        ("circles of calls among C files", _shape(found.c_circles)),
        ("circles of includes among them", _shape(found.c_include_circles)),
        ("Mode.X outside its backend", f"{len(found.mode_names)} in {len(mode_files)} files"),
        ("literals of a mode's value", f"{len(found.mode_literals)} in {len(literal_files)} files"),
        ("comments for 100 lines of code", str(found.comments_per_100(found.code_lines))),
        ("comments for 100 lines of all", str(found.comments_per_100(found.lines))),
        ("constants defined twice", str(len(found.twice))),
        ("tests: files in the largest folder", str(found.tests.folders[0])),
        ("tests: lines of the longest file", str(found.tests.files[0])),
        ("tests: lines of the longest function", str(found.tests.functions[0])),
    ]


def _above(found: Sequence[Named], most: int) -> int:
    return sum(item.number > most for item in found)


def _shape(found: list[list[str]]) -> str:
    sizes = ", ".join(str(len(circle)) for circle in found)
    return f"{len(found)} of {sizes}" if found else "0"


def details(found: Measures) -> Iterator[str]:
    """What the table only counts, by name."""

    def part(head: str, lines: Iterable[object]) -> Iterator[str]:
        yield f"\n{head}"
        yield from (f"  {line}" for line in lines)

    def by_name(items: dict[str, list[str]]) -> list[str]:
        return [f"{name}: {', '.join(values)}" for name, values in items.items()]

    yield from part("largest folders", found.product.folders[:10])
    yield from part("largest files", found.product.files[:15])
    yield from part("largest functions", found.product.functions[:10])
    yield from part("largest constructors", found.constructors[:15])
    yield from part("callables", by_name(found.callables))
    yield from part("callables in frozen dataclasses", by_name(found.value_callables))
    yield from part("import circles", map(", ".join, found.import_circles))
    yield from part("circles with imports for types", map(", ".join, found.type_circles))
    yield from part("circles of calls among C files", map(", ".join, found.c_circles))
    yield from part("circles of includes among C files", map(", ".join, found.c_include_circles))
    yield from part("Mode.X outside its backend", found.mode_names)
    yield from part("literals of a mode's value", found.mode_literals)
    yield from part("constants defined twice", by_name(found.twice))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.structure")
    parser.add_argument("root", nargs="?", type=Path, default=Path(), help="a checkout")
    parser.add_argument("--compare", type=Path, metavar="OLDROOT", help="the one before")
    parser.add_argument("--details", action="store_true", help="names of all that is counted")
    args = parser.parse_args()
    columns = [rows(measure(args.compare))] if args.compare is not None else []
    found = measure(args.root)
    columns.append(rows(found))
    heads = ("before", "after") if args.compare is not None else ("",)
    widths = [max(len(value) for _, value in column) for column in columns]
    for line in [tuple(("", head) for head in heads), *zip(*columns, strict=True)]:
        cells = (value.ljust(width) for (_, value), width in zip(line, widths, strict=True))
        print(f"{line[0][0]:38}" + "  ".join(cells).rstrip())
    if args.details:
        print("\n".join(details(found)))


if __name__ == "__main__":
    main()
