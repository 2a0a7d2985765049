"""Values of the OCI image specification, and what ``docker save`` has instead of them.

Everything here comes out of files that others made: a decoder either returns a value that is safe
to act on, or raises `BadImageError`.  Unknown fields are ignored, as the specification demands.
Sources: opencontainers/image-spec v1.1 (descriptor.md, image-index.md, manifest.md, config.md),
distribution/reference for names.

Pure: imports no socket, file, clock or trio.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, NewType, TypeVar

import msgspec

from meshnet.errors import NotFoundError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

Digest = NewType("Digest", str)
"""``sha256:`` and 64 hexadecimal digits; other algorithms are refused."""

MAX_DOCUMENT_BYTES = 4 << 20
"""Of an index, a manifest or a config: what registries accept."""
MAX_LAYERS = 127
"""Docker's limit; overlayfs takes 500 (OVL_MAX_STACK)."""

INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar"
_INDEX_TYPES = (INDEX_TYPE, "application/vnd.docker.distribution.manifest.list.v2+json")
_MANIFEST_TYPES = (MANIFEST_TYPE, "application/vnd.docker.distribution.manifest.v2+json")

REF_NAME = "org.opencontainers.image.ref.name"
"""Annotation of a descriptor in an index: the image's name, or only its tag."""
FULL_NAME = "io.containerd.image.name"
"""Annotation by Docker and containerd: the image's whole name."""

_DigestField = Annotated[Digest, msgspec.Meta(pattern=r"^sha256:[0-9a-f]{64}\Z")]
_Word = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_.-]{0,64}\Z")]
_Time = Annotated[str, msgspec.Meta(pattern=r"^[0-9TtZz:.+-]{0,64}\Z")]
_Size = Annotated[int, msgspec.Meta(ge=0)]


class BadImageError(UsageError):
    """An image, an archive or a reference is malformed, or is not what its digest says."""


# --- documents --------------------------------------------------------------------------------


class Platform(msgspec.Struct, frozen=True, omit_defaults=True):
    """What an image runs on; names as Go has them (``GOOS``, ``GOARCH``)."""

    os: _Word
    architecture: _Word
    variant: _Word = ""

    def __str__(self) -> str:
        return "/".join(filter(None, (self.os, self.architecture, self.variant)))


class Descriptor(msgspec.Struct, frozen=True, omit_defaults=True, rename="camel", kw_only=True):
    """Names content by its digest (descriptor.md)."""

    media_type: str = ""
    digest: _DigestField
    size: _Size
    platform: Platform | None = None
    annotations: dict[str, str] | None = None

    @property
    def is_index(self) -> bool:
        """Whether it names an index: the same image for several platforms."""
        return self.media_type in _INDEX_TYPES

    @property
    def names(self) -> tuple[Reference, ...]:
        """What the descriptor calls the image.

        A mere tag, which some tools write, is not a name.

        Raises:
            BadImageError: its name is not a reference.
        """
        found = self.annotations or {}
        name = found.get(FULL_NAME) or found.get(REF_NAME, "")
        return (parse_reference(name),) if FULL_NAME in found or re.search("[/:@]", name) else ()


class Index(msgspec.Struct, frozen=True, omit_defaults=True, rename="camel", kw_only=True):
    """A list of manifests (image-index.md)."""

    schema_version: int = 2
    media_type: str = INDEX_TYPE
    manifests: tuple[Descriptor, ...] = ()


class Manifest(msgspec.Struct, frozen=True, omit_defaults=True, rename="camel", kw_only=True):
    """An image: its config and its layers, the lowest first (manifest.md)."""

    schema_version: int = 2
    media_type: str = MANIFEST_TYPE
    config: Descriptor
    layers: Annotated[tuple[Descriptor, ...], msgspec.Meta(max_length=MAX_LAYERS)]


class RootFs(msgspec.Struct, frozen=True):
    """The layers by the digests of their *uncompressed* tars, the lowest first."""

    type: str
    diff_ids: tuple[_DigestField, ...]


class ImageConfig(msgspec.Struct, frozen=True, rename="pascal"):
    """How an image wants to be run: the member ``config`` of config.md.

    Attributes:
        env: ``NAME=VALUE`` each.
        user: ``USER[:GROUP]``, by name or number; empty: root.
        exposed_ports: ``PORT[/PROTOCOL]``; information only.
        volumes: paths that the image wants outside of its layers; the leading slash may be missing.
        stop_signal: such as ``SIGTERM`` or ``15``; empty: the runtime's choice.
    """

    entrypoint: tuple[str, ...] | None = None
    cmd: tuple[str, ...] | None = None
    env: tuple[str, ...] | None = None
    user: str | None = None
    working_dir: str | None = None
    volumes: dict[str, object] | None = None
    exposed_ports: dict[str, object] | None = None
    stop_signal: str | None = None
    labels: dict[str, str] | None = None

    def texts(self) -> tuple[str, ...]:
        """Everything that ends up in an argument, a variable or a path."""
        several = (self.entrypoint, self.cmd, self.env, self.volumes, self.exposed_ports)
        single = (self.user, self.working_dir, self.stop_signal)
        return (*(text for part in several for text in part or ()), *filter(None, single))

    def arguments(self, command: Sequence[str] = ()) -> tuple[str, ...]:
        """What to execute: ENTRYPOINT and `command`, or CMD where no command is given."""
        return (*(self.entrypoint or ()), *(command or self.cmd or ()))


class ImageDocument(msgspec.Struct, frozen=True):
    """An image's configuration (config.md); its digest is the image's id.

    Attributes:
        created: RFC 3339 §5.6.
    """

    architecture: _Word
    os: _Word
    rootfs: RootFs
    variant: _Word = ""
    created: _Time | None = None
    config: ImageConfig | None = None

    @property
    def platform(self) -> Platform:
        """What the image runs on."""
        return Platform(self.os, self.architecture, self.variant)


class SavedImage(msgspec.Struct, frozen=True, rename="pascal"):
    """One member of ``manifest.json`` in a ``docker save`` archive: names of files in it."""

    config: str
    layers: Annotated[tuple[str, ...], msgspec.Meta(max_length=MAX_LAYERS)]
    repo_tags: tuple[str, ...] | None = None


_T = TypeVar("_T")


def _decode(raw: bytes, kind: type[_T], what: str) -> _T:
    if len(raw) > MAX_DOCUMENT_BYTES:
        raise BadImageError(f"{what} has {len(raw)} bytes: at most {MAX_DOCUMENT_BYTES} are read")
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise BadImageError(f"{what} cannot be used ({error}): make or get the image anew") from (
            error
        )


def decode_index(raw: bytes, what: str) -> Index:
    """An index; `what` names it in errors.

    Raises:
        BadImageError: it is none.
    """
    return _decode(raw, Index, what)


def decode_manifest(raw: bytes, what: str) -> Manifest:
    """A manifest.

    Raises:
        BadImageError: it is none.
    """
    manifest = _decode(raw, Manifest, what)
    if manifest.schema_version != 2:
        raise BadImageError(
            f"{what} has schema version {manifest.schema_version}: get the image with a newer tool"
        )
    return manifest


def decode_saved(raw: bytes, what: str) -> tuple[SavedImage, ...]:
    """``manifest.json`` of ``docker save``.

    Raises:
        BadImageError: it is none.
    """
    return _decode(raw, tuple[SavedImage, ...], what)


def decode_config(raw: bytes, what: str) -> ImageDocument:
    """An image's configuration, checked: nothing in it can break out of an argument or a path.

    Raises:
        BadImageError: it is none, or a value cannot be used.
    """
    document = _decode(raw, ImageDocument, what)
    if document.rootfs.type != "layers":
        raise BadImageError(f"{what}: rootfs type {document.rootfs.type!r} is not 'layers'")
    config = document.config or ImageConfig()
    if any("\0" in text for text in config.texts()):
        raise BadImageError(f"{what} has a NUL character in a value: make the image anew")
    for setting in config.env or ():
        if not setting.partition("=")[0] or "=" not in setting:
            raise BadImageError(f"{what}: Env {setting!r} is not NAME=VALUE: make the image anew")
    for path in (config.working_dir or "/", *(config.volumes or ())):
        if ".." in path.split("/"):
            raise BadImageError(f"{what}: path {path!r} has '..': make the image anew")
    if not (config.working_dir or "/").startswith("/"):
        raise BadImageError(
            f"{what}: WorkingDir {config.working_dir!r} is not absolute: make the image anew"
        )
    for port in config.exposed_ports or ():
        if not re.fullmatch(r"[0-9]{1,5}(-[0-9]{1,5})?(/[a-z]+)?", port):
            raise BadImageError(f"{what}: exposed port {port!r} is none: make the image anew")
    if not re.fullmatch(r"|[0-9]{1,2}|(SIG)?[A-Z0-9+-]{1,12}", config.stop_signal or ""):
        raise BadImageError(f"{what}: stop signal {config.stop_signal!r} is none: give SIGTERM")
    return document


def encode(document: msgspec.Struct) -> bytes:
    """A document as JSON."""
    return msgspec.json.encode(document)


# --- platforms --------------------------------------------------------------------------------

_MACHINES = {
    "x86_64": ("amd64", ""),
    "i386": ("386", ""),
    "i686": ("386", ""),
    "aarch64": ("arm64", "v8"),
    "armv7l": ("arm", "v7"),
    "armv6l": ("arm", "v6"),
}


def platform_of(machine: str) -> Platform:
    """The platform of a Linux host, by the machine that uname(2) tells."""
    return Platform("linux", *_MACHINES.get(machine, (machine, "")))


def fitness(image: Platform, host: Platform) -> int | None:
    """How well an image runs on a host: the greater, the better; None: not at all.

    A variant names the least CPU that is needed: one that is not the host's own fits where it is
    lower.
    """
    if (image.os, image.architecture) != (host.os, host.architecture):
        return None
    if image.variant == host.variant:
        return 100
    needed, has = _level(image.variant), _level(host.variant)
    return needed if needed <= has else None


def _level(variant: str) -> int:
    return int(variant[1:]) if re.fullmatch(r"v[0-9]", variant) else 0


def choose(descriptors: Iterable[Descriptor], host: Platform, what: str) -> list[Descriptor]:
    """Those of an index that are for the host; of several platforms only the best.

    Descriptors without a platform are all kept: each may be an image of its own.

    Raises:
        NotFoundError: there are some, and none fits.
    """
    plain = [d for d in descriptors if d.platform is None]
    others = [d for d in descriptors if d.platform is not None]
    ranked = [(f, d) for d in others if d.platform and (f := fitness(d.platform, host)) is not None]
    if others and not ranked and not plain:
        offered = ", ".join(sorted({str(d.platform) for d in others}))
        raise NotFoundError(f"{what} has no image for {host}, only {offered}: get one that has")
    best = max((fit for fit, _ in ranked), default=0)
    return [*plain, *(d for fit, d in ranked if fit == best)]


# --- references -------------------------------------------------------------------------------

DEFAULT_REGISTRY = "docker.io"
_DEFAULT_FOLDER = "library"
_COMPONENT = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*")
_REGISTRY = re.compile(
    r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9a-fA-F:]+\])(?::[0-9]{1,5})?"
)
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_MAX_NAME = 255


@dataclass(frozen=True, slots=True, order=True)
class Reference:
    """The name of an image, with nothing left to defaults.

    Attributes:
        repository: path at the registry: ``library/busybox``.
        tag: empty only beside a digest.
    """

    registry: str
    repository: str
    tag: str = ""
    digest: str = ""

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        digest = f"@{self.digest}" if self.digest else ""
        return f"{self.registry}/{self.repository}{tag}{digest}"


def parse_reference(text: str) -> Reference:
    """Docker's way to read a name: ``busybox`` is ``docker.io/library/busybox:latest``.

    Raises:
        BadImageError: it is none.
    """
    name, at, digest = text.partition("@")
    head, colon, tag = name.rpartition(":")
    if not colon or "/" in tag:
        head, colon, tag = name, "", ""
    registry, slash, repository = head.partition("/")
    if not slash or not (set(".:") & set(registry) or registry == "localhost"):
        registry, repository = DEFAULT_REGISTRY, head
    if registry == "index.docker.io":
        registry = DEFAULT_REGISTRY
    if registry == DEFAULT_REGISTRY and "/" not in repository:
        repository = f"{_DEFAULT_FOLDER}/{repository}"
    if not colon and not at:
        tag = "latest"
    if not (
        _REGISTRY.fullmatch(registry)
        and all(_COMPONENT.fullmatch(part) for part in repository.split("/"))
        and len(registry) + len(repository) < _MAX_NAME
        and (_TAG.fullmatch(tag) or (at and not colon))
        and (not at or _DIGEST.fullmatch(digest))
    ):
        raise BadImageError(
            f"image name {text!r} is none: give [REGISTRY/]NAME[:TAG][@sha256:DIGEST], the name in "
            "small letters"
        )
    return Reference(registry, repository, tag, digest)
