"""``meshnet image``: load, list, inspect, remove, pull and push images.

Files and registries are read with the rights and the credentials of whoever runs the command; the
agent only ever sees a stream.
"""

from __future__ import annotations

import os
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

from meshnet.cli.client import Client
from meshnet.cli.commands.completion import complete_images
from meshnet.cli.output import joined, print_either, print_json, print_table
from meshnet.cli.progress import progress
from meshnet.cli.skopeo import skopeo
from meshnet.errors import NotFoundError, UsageError

TYPE_CHECKING = False  # see meshnet.unix_http
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable
    from typing import IO, Any

    from meshnet.cli.commands.completion import Subparsers

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def add_parser(commands: Subparsers) -> None:
    """Add the command group."""
    group = commands.add_parser("image", help="load, list, inspect, remove, pull and push images")
    actions = group.add_subparsers(prog=group.prog, metavar="ACTION", required=True)
    load = actions.add_parser(
        "load",
        help="load images from a file or a directory",
        description="Load all images for this host's platform from an OCI image layout (a "
        "directory or a tar) or from what docker save made. A tar may be compressed with gzip.",
        epilog="example: docker save busybox | meshnet image load -",
    )
    load.add_argument("path", metavar="FILE|DIR", help="what to load; - is standard input")
    load.add_argument("--name", metavar="REF", help="name the image (default: as its file says)")
    _finish(load, _load)
    _finish(actions.add_parser("ls", help="list images"), _ls)
    inspect = actions.add_parser("inspect", help="show an image and how it wants to be run")
    _add_image(inspect)
    _finish(inspect, _inspect)
    rm = actions.add_parser(
        "rm",
        help="remove images",
        description="Remove names of images, or images by their ids. An image goes with its last "
        "name, and a layer with its last image. Refused while a container has the image.",
    )
    _add_image(rm, nargs="+")
    _finish(rm, _rm)
    pull = actions.add_parser(
        "pull",
        help="get an image from a registry",
        description="Get an image from a registry through skopeo, with your own credentials.",
    )
    _add_image(pull)
    _finish(pull, _pull)
    push = actions.add_parser(
        "push",
        help="send an image to the registry that its name says",
        description="Send an image to a registry through skopeo, with your own credentials.",
    )
    _add_image(push)
    _finish(push, _push)
    for registry in (pull, push):
        registry.add_argument(
            "--insecure", action="store_true", help="speak HTTP too, and trust any certificate"
        )


def _add_image(parser: argparse.ArgumentParser, nargs: str | None = None) -> None:
    argument = parser.add_argument(
        "image", metavar="IMAGE", nargs=nargs, help="a name, an id, or the beginning of an id"
    )
    argument.completer = complete_images  # type: ignore[attr-defined]


def _finish(parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], int]) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.set_defaults(run=run)


def _load(args: argparse.Namespace) -> int:
    with progress(f"loading {args.path}"):
        documents = _upload(Client(args.socket), args.path, args.name)
    return _print_loaded(args, documents)


def _print_loaded(args: argparse.Namespace, documents: list[dict[str, Any]]) -> int:
    lines = (joined(document["names"] or [document["id"]]) for document in documents)
    return print_either(args.json, documents, "\n".join(lines))


def _upload(client: Client, path: str, name: str | None) -> list[dict[str, Any]]:
    query = {"name": name} if name is not None else {}
    if path == "-":
        source: IO[bytes] = sys.stdin.buffer
    elif os.path.isdir(path):
        return list(client.upload("images", query=query, write=lambda file: _pack(path, file)))
    else:
        source = _open(path)
    with source:
        try:
            return list(
                client.upload(
                    "images",
                    query=query,
                    write=lambda file: shutil.copyfileobj(source, file, 1 << 18),
                )
            )
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from error


def _open(path: str) -> IO[bytes]:
    try:
        return open(path, "rb")
    except FileNotFoundError as error:
        raise NotFoundError(f"{path} does not exist: give a file or a directory") from error
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read ({error.strerror}): give a file that you can read"
        ) from error


def _pack(directory: str, output: IO[bytes]) -> None:
    """Write an image layout as a tar: its own files, and nothing else of the directory."""
    try:
        with tarfile.open(fileobj=output, mode="w|", bufsize=1 << 18) as tar:
            for name in ("oci-layout", "index.json", "blobs"):
                tar.add(os.path.join(directory, name), name)
    except ConnectionError:
        raise  # of the agent, which hung up; ConnectionError is an OSError, too
    except OSError as error:
        raise UsageError(
            f"{directory} cannot be read as an OCI image layout ({error}): give one, or a file"
        ) from error


def _ls(args: argparse.Namespace) -> int:
    documents = Client(args.socket).get("images")
    if args.json:
        print_json(documents)
        return 0
    print_table(
        ("NAME", "ID", "CREATED", "LAYERS", "SIZE", "IN USE"),
        (
            (
                name,
                _short(d["id"]),
                (d["created"] or "-")[:10],
                d["layers"],
                _size(d["size_bytes"]),
                "yes" if d["in_use"] else "no",
            )
            for d in documents
            for name in d["names"] or ["-"]
        ),
    )
    return 0


def _short(image_id: str) -> str:
    return image_id.partition(":")[2][:12]


def _size(size: float) -> str:
    unit = 0
    while size >= 1024 and unit < len(_UNITS) - 1:
        size /= 1024
        unit += 1
    return f"{size:.1f} {_UNITS[unit]}" if unit else f"{size} B"


def _inspect(args: argparse.Namespace) -> int:
    document = Client(args.socket).get("images", args.image)
    if args.json:
        print_json(document)
        return 0
    config = document["config"]
    for key, value in (
        ("names", joined(document["names"])),
        ("id", document["id"]),
        ("digest", document["digest"]),
        ("platform", f"{document['os']}/{document['architecture']}"),
        ("created", document["created"] or "-"),
        ("size", _size(document["size_bytes"])),
        ("layers", document["layers"]),
        ("containers", joined(document["containers"])),
        *((key.replace("_", " "), _text(value)) for key, value in config.items()),
    ):
        print(f"{key + ':':16}{value}")
    return 0


def _text(value: object) -> str:
    """Show an image's own text on one line.  Escape sequences in it must not reach a terminal."""
    if isinstance(value, dict):
        value = [f"{key}={text}" for key, text in value.items()]
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return "".join(letter if letter.isprintable() else "?" for letter in text) or "-"


def _rm(args: argparse.Namespace) -> int:
    client = Client(args.socket)
    documents = [client.delete("images", image) for image in args.image]
    lines = [
        line
        for d in documents
        for line in (
            *(f"untagged {name}" for name in d["untagged"]),
            *([f"deleted {d['id']}"] if d["deleted"] else []),
        )
    ]
    return print_either(args.json, documents, "\n".join(lines))


def _pull(args: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory(prefix="meshnet-") as directory:
        layout = str(Path(directory, "layout"))
        with progress(f"pulling {args.image}"):
            skopeo(f"docker://{args.image}", f"oci:{layout}:image", args.image, args.insecure)
            documents = _upload(Client(args.socket), layout, args.image)
    return _print_loaded(args, documents)


def _push(args: argparse.Namespace) -> int:
    client = Client(args.socket)
    document = client.get("images", args.image)
    with (
        tempfile.NamedTemporaryFile(prefix="meshnet-", suffix=".tar") as file,
        progress(f"pushing {args.image}"),
    ):
        client.download("archives", args.image, output=file)
        file.flush()
        skopeo(f"oci-archive:{file.name}", f"docker://{args.image}", args.image, args.insecure)
    return print_either(args.json, document, args.image)
