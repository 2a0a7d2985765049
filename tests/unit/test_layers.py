"""Imports go one way: agent → edges (store, kernel, lab) → pure core; the client stands alone."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import meshnet
import meshnet_agent

if TYPE_CHECKING:
    from collections.abc import Iterator

MESHNET = Path(meshnet.__path__[0])
AGENT = Path(meshnet_agent.__path__[0])
LOWEST = "system"
"""The edge that all others may build on."""
EDGES = ("store", "kernel", "lab", "cli", "runtime", "vtep", "arguments", "unix_http", LOWEST)
PURE_FOLDERS = ("runtime/spec/",)
PURE_IN_EDGES = {
    "store/__init__.py", "store/addresses.py", "store/mirror.py", "store/registry.py",
    "store/registry_rules.py", "store/saved.py",
    "kernel/ordering.py",
    "runtime/images/oci.py", "runtime/images/names.py",
}  # fmt: skip
CLAIM = re.compile(r"\b(Pure|[Nn]o I/O)\b(?! but)")
"""What a module's docstring says that is held to it."""
IMPURE = {
    "asyncio", "ctypes", "fcntl", "http", "io", "multiprocessing", "os", "pathlib", "pyroute2",
    "random", "secrets", "select", "shutil", "signal", "socket", "subprocess", "tempfile",
    "threading", "time", "trio", "urllib",
}  # fmt: skip
VALUES = {f"socket.{name}" for name in ("AF_INET", "AF_INET6", "inet_ntop", "inet_pton")}
"""Numbers and parsers: no I/O, whatever they are found in."""


def modules(root: Path) -> dict[str, Path]:
    """Files by their path below `root`."""
    return {str(path.relative_to(root)): path for path in sorted(root.rglob("*.py"))}


def is_pure(name: str) -> bool:
    return (
        name in PURE_IN_EDGES
        or name.startswith(PURE_FOLDERS)
        or name.removesuffix(".py").split("/")[0] not in EDGES
    )


def imports(path: Path, *, top_level_only: bool = False, for_types: bool = False) -> Iterator[str]:
    """Modules that a file imports when it runs, and those for the type checker if asked for."""
    yield from _imports(ast.parse(path.read_text()), top_level_only, for_types)


def impure_imports(path: Path) -> set[str]:
    return {m for m in set(imports(path)) - VALUES if m.split(".")[0] in IMPURE}


def _imports(node: ast.AST, top_level_only: bool, for_types: bool) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=str(module), names=names, level=level):
                assert level == 0, "imports are absolute"
                yield from (f"{module}.{alias.name}" for alias in names)
            case ast.If(test=ast.Name(id="TYPE_CHECKING")) if not for_types:
                continue
            case ast.FunctionDef() | ast.AsyncFunctionDef() if top_level_only:
                continue
            case _:
                yield from _imports(child, top_level_only, for_types)


CORE = {name: path for name, path in modules(MESHNET).items() if is_pure(name)}


def test_the_core_is_what_it_should_be() -> None:
    expected = {"model.py", "plan.py", "diff.py", "codec/networks.py", "wire/mac.py",
                "backends/vxlan.py"}  # fmt: skip
    assert expected | PURE_IN_EDGES <= CORE.keys()


@pytest.mark.parametrize("name", sorted(CORE))
def test_the_core_does_no_io_and_knows_no_edge(name: str) -> None:
    found = set(imports(CORE[name]))
    assert not impure_imports(CORE[name])
    for module in found:
        assert not module.startswith("meshnet_agent")
        if module.startswith("meshnet."):
            below = module.split(".")[1:]
            allowed = below[0] not in EDGES or (
                below[0] in ("store", "runtime") and name.startswith(f"{below[0]}/")
            )
            assert allowed, f"{name} imports {module}"


def _claimants() -> dict[str, Path]:
    """Modules of the library and of the agent whose docstring says that they are pure."""
    return {
        f"{root.name}/{name}": path
        for root in (MESHNET, AGENT)
        for name, path in modules(root).items()
        if CLAIM.search(ast.get_docstring(ast.parse(path.read_text())) or "")
    }


CLAIMANTS = _claimants()


def test_claims_are_found() -> None:
    assert {"meshnet/vtep/peers.py", "meshnet/kernel/takeover/plan.py",
            "meshnet_agent/dataplane/fallback.py"} <= CLAIMANTS.keys()  # fmt: skip


@pytest.mark.parametrize("name", sorted(CLAIMANTS))
def test_who_claims_to_be_pure_is(name: str) -> None:
    assert not impure_imports(CLAIMANTS[name])


@pytest.mark.parametrize("name", sorted(modules(MESHNET)))
def test_the_library_does_not_know_the_agent(name: str) -> None:
    assert not [m for m in imports(MESHNET / name) if m.startswith("meshnet_agent")]


@pytest.mark.parametrize("edge", ["store", "kernel", "runtime"])
def test_edges_do_not_know_each_other(edge: str) -> None:
    others = tuple(f"meshnet.{other}" for other in EDGES if other not in (edge, LOWEST))
    for name, path in modules(MESHNET / edge).items():
        found = [m for m in imports(path) if m.startswith(others)]
        assert not found, f"{edge}/{name} imports {found}"


def _by_module() -> dict[str, Path]:
    """All modules of the library and of the agent, by their dotted names."""
    return {
        f"{root.name}.{name.removesuffix('.py').replace('/', '.')}".removesuffix(".__init__"): path
        for root in (MESHNET, AGENT)
        for name, path in modules(root).items()
    }


def _graph(known: dict[str, Path], *, for_types: bool) -> dict[str, set[str]]:
    """Which modules each one imports, wherever in it."""
    return {
        name: {
            found
            for module in imports(path, for_types=for_types)
            if (found := module if module in known else module.rpartition(".")[0]) in known
            and found != name
        }
        for name, path in known.items()
    }


def test_no_circle_of_imports() -> None:
    """An import within a function that hides a circle counts, too, and so does one for types."""
    graph = _graph(_by_module(), for_types=True)
    assert sum(map(len, graph.values())) > 1000
    TopologicalSorter(graph).prepare()


def test_no_circle_of_calls_in_c() -> None:
    """The native engine's files call each other one way."""
    texts = {path.name: path.read_text() for path in (MESHNET / "vtep/native/src").glob("*.c")}
    defined = re.compile(r"^(?!static)\w[\w ]*[ *](\w+)\([^;{]*\)\n\{", re.MULTILINE)
    home = {name: file for file, text in texts.items() for name in defined.findall(text)}
    assert {"note", "pump_in", "pump_out", "write_to_tun"} <= home.keys()
    graph = {
        file: {home[word] for word in re.findall(r"\w+", text) if home.get(word, file) != file}
        for file, text in texts.items()
    }
    TopologicalSorter(graph).prepare()


def test_only_the_client_imports_the_client() -> None:
    for name, path in _by_module().items():
        if not name.startswith("meshnet.cli"):
            assert not [m for m in imports(path, for_types=True) if m.startswith("meshnet.cli")]


def test_nothing_imports_a_program() -> None:
    """What a program and others need is not in its ``main``."""
    known = _by_module()
    mains = {name for name in known if name.endswith(".main")}
    for name, found in _graph(known, for_types=True).items():
        assert not {m for m in found & mains if name != m.replace(".main", ".__main__")}, name


def test_what_is_imported_is_declared() -> None:
    project = tomllib.loads((MESHNET.parent / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[<>=]", text)[0] for text in project["dependencies"]}
    packages = {"grpc": "grpcio"}
    used = {
        packages.get(first, first)
        for path in _by_module().values()
        for module in imports(path, for_types=True)
        if (first := module.split(".")[0]) not in sys.stdlib_module_names
        and first not in ("meshnet", "meshnet_agent")
    }
    assert used == declared


def test_the_client_starts_fast() -> None:
    """What a command needs is imported by that command."""
    for name, path in modules(MESHNET / "cli").items():
        for module in imports(path, top_level_only=True):
            first = module.split(".")[0]
            allowed = first in sys.stdlib_module_names or module.startswith(
                (
                    *("meshnet.errors", "meshnet.cli", "meshnet.arguments", "meshnet.system.group"),
                    "meshnet.unix_http",
                )
            )
            assert allowed, f"cli/{name} imports {module} at its top"


def test_the_userspace_vtep_is_small() -> None:
    """Its process starts within milliseconds and stays small: no library, no other edge."""
    files = [MESHNET / name for name in modules(MESHNET) if name.startswith("vtep/")]
    for path in files:
        for module in imports(path):
            allowed = module.split(".")[0] in sys.stdlib_module_names or module.startswith(
                ("meshnet.errors", "meshnet.wire", "meshnet.vtep", "meshnet.system.proc")
            )
            assert allowed, f"{path.name} imports {module}"


def test_each_third_party_library_has_its_place() -> None:
    places = {
        "pyroute2": {"kernel/drivers/iproute.py"},
        "etcd3": {"store/etcd.py", "store/_etcd_rpc.py", "store/_etcd_messages.py",
                  "store/_etcd_watch.py", "store/_etcd_config.py"},
        "msgspec": {"codec/document.py", "codec/endpoints.py", "codec/hosts.py",
                    "codec/networks.py", "store/__init__.py", "store/saved.py",
                    "runtime/images/oci.py"},
    }  # fmt: skip
    for library, allowed in places.items():
        users = {
            name
            for name, path in modules(MESHNET).items()
            if any(m.split(".")[0] == library for m in imports(path))
        }
        assert users <= allowed, f"{library} is imported by {users - allowed}"


def test_only_programs_run_trio() -> None:
    programs = {AGENT / "main.py", MESHNET / "kernel/takeover/main.py"}
    for root in (MESHNET, AGENT):
        for name, path in modules(root).items():
            if path in programs:
                continue
            calls = {
                ast.unparse(node.func)
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.Call)
            }
            assert "trio.run" not in calls, name
