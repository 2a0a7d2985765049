"""Copies images from and to registries with ``skopeo`` (Debian package skopeo), without a shell."""

from __future__ import annotations

import re
import subprocess

from meshnet.errors import KernelRefusedError, MeshnetError, NotFoundError, PolicyRefusedError

_MESSAGE = re.compile(r'msg="((?:[^"\\]|\\.)*)"')
_KINDS: dict[str, type[MeshnetError]] = {
    "manifest unknown": NotFoundError,
    "name unknown": NotFoundError,
    "unauthorized": PolicyRefusedError,
    "denied": PolicyRefusedError,
}


def skopeo(source: str, target: str, image: str, insecure: bool) -> None:
    """Copy an image; `source` and `target` are as skopeo names them.

    Raises:
        NotFoundError: the registry does not have the image.
        PolicyRefusedError: the registry wants other credentials.
        KernelRefusedError: skopeo is not installed.
        MeshnetError: skopeo failed otherwise.
    """
    registry = "src" if source.startswith("docker:") else "dest"
    options = [f"--{registry}-tls-verify=false"] if insecure else []
    try:
        done = subprocess.run(
            ["skopeo", "copy", "--quiet", *options, "--", source, target],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    except FileNotFoundError as error:
        raise KernelRefusedError(
            f"image {image} needs skopeo, which this host lacks: install the package skopeo"
        ) from error
    if done.returncode != 0:
        raise error_of(done.stderr, image)


def error_of(stderr: str, image: str) -> MeshnetError:
    """Translate the last error that skopeo printed; `stderr` is all that it printed there."""
    found = _MESSAGE.findall(stderr)
    # logrus quotes the message: msg="…", with a backslash before quotes within.
    reason = re.sub(r"\\(.)", r"\1", found[-1]) if found else stderr.strip() or "it does not say"
    kind = next((k for words, k in _KINDS.items() if words in reason.lower()), MeshnetError)
    remedy = "log in (skopeo login)" if kind is PolicyRefusedError else "check name and registry"
    return kind(f"image {image}: {' '.join(reason.split())}: {remedy}")
