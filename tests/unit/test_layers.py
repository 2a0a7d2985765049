"""Imports go one way: agent → edges (store, kernel, lab) → pure core; the client stands alone."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import meshnet
import meshnet_agent

if TYPE_CHECKING:
    from collections.abc import Iterator

MESHNET = Path(meshnet.__path__[0])
AGENT = Path(meshnet_agent.__path__[0])
EDGES = ("store", "kernel", "lab", "cli", "runtime", "vtep", "files", "unix_http")
PURE_IN_EDGES = {
    "store/__init__.py", "store/addresses.py", "store/mirror.py", "store/registry.py",
    "kernel/ordering.py",
    "runtime/images/oci.py", "runtime/images/names.py", "runtime/spec/__init__.py",
    "runtime/spec/options.py", "runtime/spec/seccomp.py", "runtime/spec/config.py",
    "runtime/spec/users.py", "runtime/spec/userns.py", "runtime/spec/id_ranges.py",
    "runtime/spec/mount_points.py",
}  # fmt: skip
IMPURE = {
    "asyncio", "ctypes", "fcntl", "http", "io", "multiprocessing", "os", "pathlib", "pyroute2",
    "random", "secrets", "select", "shutil", "signal", "socket", "subprocess", "tempfile",
    "threading", "time", "trio", "urllib",
}  # fmt: skip


def modules(root: Path) -> dict[str, Path]:
    """Files by their path below `root`."""
    return {str(path.relative_to(root)): path for path in sorted(root.rglob("*.py"))}


def is_pure(name: str) -> bool:
    return name in PURE_IN_EDGES or name.removesuffix(".py").split("/")[0] not in EDGES


def imports(path: Path, *, top_level_only: bool = False) -> Iterator[str]:
    """Modules that a file imports when it runs; those for the type checker do not count."""
    yield from _imports(ast.parse(path.read_text()), top_level_only)


def _imports(node: ast.AST, top_level_only: bool) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=str(module), names=names, level=level):
                assert level == 0, "imports are absolute"
                yield from (f"{module}.{alias.name}" for alias in names)
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                continue
            case ast.FunctionDef() | ast.AsyncFunctionDef() if top_level_only:
                continue
            case _:
                yield from _imports(child, top_level_only)


CORE = {name: path for name, path in modules(MESHNET).items() if is_pure(name)}


def test_the_core_is_what_it_should_be() -> None:
    expected = {"model.py", "plan.py", "diff.py", "codec/networks.py", "wire/mac.py",
                "backends/vxlan.py"}  # fmt: skip
    assert expected | PURE_IN_EDGES <= CORE.keys()


@pytest.mark.parametrize("name", sorted(CORE))
def test_the_core_does_no_io_and_knows_no_edge(name: str) -> None:
    found = set(imports(CORE[name]))
    assert not {module for module in found if module.split(".")[0] in IMPURE}
    for module in found:
        assert not module.startswith("meshnet_agent")
        if module.startswith("meshnet."):
            below = module.split(".")[1:]
            allowed = below[0] not in EDGES or (
                below[0] in ("store", "runtime") and name.startswith(f"{below[0]}/")
            )
            assert allowed, f"{name} imports {module}"


@pytest.mark.parametrize("name", sorted(modules(MESHNET)))
def test_the_library_does_not_know_the_agent(name: str) -> None:
    assert not [m for m in imports(MESHNET / name) if m.startswith("meshnet_agent")]


@pytest.mark.parametrize("edge", ["store", "kernel", "runtime"])
def test_edges_do_not_know_each_other(edge: str) -> None:
    others = tuple(f"meshnet.{other}" for other in EDGES if other not in (edge, "files"))
    for name, path in modules(MESHNET / edge).items():
        found = [m for m in imports(path) if m.startswith(others)]
        assert not found, f"{edge}/{name} imports {found}"


def test_the_client_starts_fast() -> None:
    """What a command needs is imported by that command."""
    for name, path in modules(MESHNET / "cli").items():
        for module in imports(path, top_level_only=True):
            first = module.split(".")[0]
            allowed = first in sys.stdlib_module_names or module.startswith(
                ("meshnet.errors", "meshnet.cli", "meshnet.unix_http")
            )
            assert allowed, f"cli/{name} imports {module} at its top"


def test_the_userspace_vtep_is_small() -> None:
    """Its process starts within milliseconds and stays small: no library, no other edge."""
    files = [MESHNET / name for name in modules(MESHNET) if name.startswith("vtep/")]
    for path in files:
        for module in imports(path):
            allowed = module.split(".")[0] in sys.stdlib_module_names or module.startswith(
                ("meshnet.errors", "meshnet.wire", "meshnet.vtep", "meshnet.vtep.tun")
            )
            assert allowed, f"{path.name} imports {module}"


def test_each_third_party_library_has_its_place() -> None:
    places = {
        "pyroute2": {"kernel/netlink.py"},
        "etcd3": {"store/etcd.py", "store/_etcd_rpc.py", "store/_etcd_messages.py",
                  "store/_etcd_watch.py", "store/_etcd_config.py"},
        "msgspec": {"codec/document.py", "codec/endpoints.py", "codec/hosts.py",
                    "codec/networks.py", "store/__init__.py", "runtime/images/oci.py"},
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
