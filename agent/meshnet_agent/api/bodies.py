"""Reads what the API's requests carry, up to a limit, decodes it, and says what is wrong."""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import msgspec
from starlette.requests import ClientDisconnect

from meshnet.backends import Setting
from meshnet.backends.table import BACKENDS, check_setting
from meshnet.codec.document import MAX_VALUE_BYTES
from meshnet.errors import UsageError
from meshnet.model import (
    DEFAULT_HOST_PREFIX,
    DEFAULT_HOST_PREFIX6,
    AddressRange,
    IpAddress,
    IpNetwork,
    Network,
    NetworkName,
    Vni,
)
from meshnet.modes import DEFAULT_MODE, Mode
from meshnet.ports import parse_all_published
from meshnet.runtime.spec.options import NO_NETWORKS
from meshnet.text import parse_address, parse_network, printable
from meshnet_agent.endpoints.hold import BoundNetns
from meshnet_agent.endpoints.request import AttachRequest

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.requests import Request

_T = TypeVar("_T")
_Q = TypeVar("_Q", bound=msgspec.Struct)
_SHOWN = 300
"""Characters of a request that an error quotes."""
_PLACE = re.compile(r"(.+) - at `\$\.(.+)`")
"""An error of msgspec: what is wrong, and the path of the member."""
_STEP = re.compile(r"\.?([^.\[\]]+)|\[(\d+)\]")
"""One step of such a path: a name or an index."""

_Pid = Annotated[int, msgspec.Meta(ge=1, le=1 << 22)]
"""linux/threads.h: PID_MAX_LIMIT."""


class NetworkBody(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """Body of ``POST /v1/networks``."""

    name: str
    subnets: list[str]
    mode: Mode = DEFAULT_MODE
    host_prefix: int | None = None
    host_prefix6: int | None = None
    vni: int | None = None
    port: int | None = None
    mtu: int | None = None
    direct_routing: bool = False
    fallback: Literal["auto", "never"] = "never"
    parent: str | None = None
    ranges: list[str] = []
    gateways: list[str] = []
    internal: bool = False
    host_access: bool = False


class NetnsBody(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """A network namespace by its path.

    Attributes:
        pid: a process in whose file system the path is; None: in the agent's.
        inode: the namespace's, as that process sees it there; None: it did not look.
    """

    path: str
    pid: _Pid | None = None
    inode: int | None = None

    @property
    def value(self) -> BoundNetns:
        """As the parts take it."""
        return BoundNetns(path=self.path, root_of=self.pid, inode=self.inode)


class AttachBody(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """Body of ``POST /v1/attach``: of a process, or of a namespace for an owner."""

    pid: _Pid | None = None
    netns: NetnsBody | None = None
    owner: str | None = None
    network: str
    ifname: str = "eth0"
    ip: str | None = None
    name: str | None = None
    default_route: bool = True
    publish: list[str] = []


class DetachBody(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """Body of ``POST /v1/detach``: a process, or a namespace."""

    pid: _Pid | None = None
    netns: NetnsBody | None = None
    network: str


class ReleaseBody(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """Body of ``POST /v1/release``; without a network: on all of them."""

    owner: str
    network: str | None = None


class CollectBody(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """Body of ``POST /v1/collect``: of the owners with that prefix, only the valid ones stay."""

    prefix: Annotated[str, msgspec.Meta(min_length=1)]
    valid: list[str]


class PublishBody(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """Body of ``POST /v1/publish`` and of ``POST /v1/unpublish``."""

    endpoint: str
    ports: list[str]


def shown_path(request: Request) -> str:
    """The request's path.  Not from ``request.url``, which fails for some ``Host`` headers."""
    return printable(str(request.scope["path"]), _SHOWN)


async def read_body(request: Request, kind: type[_T]) -> _T:
    """The body of a request, as a value of a type.

    Raises:
        UsageError: it is too large, breaks off, is not JSON, or does not fit the type.
    """
    path = shown_path(request)
    raw = bytearray()
    try:
        async for chunk in request.stream():
            raw += chunk
            # Counted as it comes: Content-Length may be missing or wrong.
            if len(raw) > MAX_VALUE_BYTES:
                raise UsageError(
                    f"request body of {path} is larger than {MAX_VALUE_BYTES} bytes: send less"
                )
    except ClientDisconnect as error:
        raise UsageError(f"request body of {path} breaks off: send it again") from error
    try:
        document = msgspec.json.decode(bytes(raw))
    except (ValueError, RecursionError) as error:  # malformed, not UTF-8, nested too deeply
        reason = printable(str(error), _SHOWN)
        raise UsageError(f"request body of {path}: {reason}") from error
    return convert(document, kind, path)


def read_query(request: Request, kind: type[_Q]) -> _Q:
    """The parameters after the ``?``, as a struct; those without a field in it are ignored.

    Raises:
        UsageError: one is not usable; the message names it and its value.
    """
    given = dict(request.query_params)
    try:
        return msgspec.convert(given, kind, strict=False)
    except ValueError as error:
        found = _PLACE.fullmatch(str(error))
        if found is None:
            reason = printable(str(error), _SHOWN)
            raise UsageError(f"query of {shown_path(request)}: {reason}") from error
        value = given.get(found[2])
        raise UsageError(_unusable(found[2], value, found[1])) from error


def convert(document: Any, kind: type[_T], path: str) -> _T:  # noqa: ANN401
    """A JSON value as a value of a type.

    Raises:
        UsageError: it does not fit; the message names the member and its value.
    """
    # A struct refuses unknown fields by itself; for a dataclass msgspec ignores them.
    if is_dataclass(kind) and isinstance(document, dict):
        for unknown in sorted(document.keys() - {f.name for f in fields(kind)}):
            raise UsageError(
                printable(f"request body of {path}: unknown field {unknown!r}", _SHOWN)
            )
    try:
        return msgspec.convert(document, kind)
    except (ValueError, RecursionError) as error:
        found = _PLACE.fullmatch(str(error))
        if found is None:
            reason = printable(str(error), _SHOWN)
            raise UsageError(f"request body of {path}: {reason}") from error
        value = document
        for name, index in _STEP.findall(found[2]):
            value = value[int(index)] if index else value[name]
        raise UsageError(_unusable(found[2], value, found[1])) from error


def _unusable(place: str, value: object, reason: str) -> str:
    # What may be null may be left out, too, which is no news to whoever gave it.
    reason = reason.lower().replace(" | null", "")
    return printable(f"{place} {value!r:.80} is not usable: {reason}", _SHOWN)


def network_builder(body: NetworkBody) -> Callable[[Vni], Network]:
    """Return a function that makes the network a body asks for, given its VNI.

    The VNI comes later because the store chooses it if the body does not.

    Raises:
        UsageError: a setting is not usable, or has no effect; the function raises it, too.
    """
    subnets = sorted(map(_cidr, body.subnets), key=lambda s: s.version)
    _check_given(body, subnets)

    def build(vni: Vni) -> Network:
        return Network(
            name=NetworkName(body.name),
            mode=body.mode,
            subnets=tuple(subnets),
            vni=vni,
            port=_given(body.port, BACKENDS[body.mode].default_port(vni)),
            host_prefix=_given(body.host_prefix, DEFAULT_HOST_PREFIX),
            host_prefix6=_given(body.host_prefix6, DEFAULT_HOST_PREFIX6),
            mtu_bytes=body.mtu,
            direct_routing=body.direct_routing,
            fallback=body.fallback == "auto",
            parent=body.parent,
            ranges=tuple(sorted(map(_range, body.ranges), key=lambda r: r.version)),
            gateways=tuple(sorted(map(_address, body.gateways), key=lambda g: g.version)),
            internal=body.internal,
            host_access=body.host_access,
        )

    return build


def attach_request(body: AttachBody) -> AttachRequest:
    """What a body asks to attach.

    Raises:
        UsageError: an address or a port is not usable.
    """
    return AttachRequest(
        network=body.network,
        ifname=body.ifname,
        ip=_address(body.ip) if body.ip is not None else None,
        name=body.name,
        default_route=body.default_route,
        publish=parse_all_published(body.publish),
    )


def _given(value: int | None, default: int) -> int:
    return default if value is None else value


def _check_given(body: NetworkBody, subnets: list[IpNetwork]) -> None:
    """Refuse settings of a new network that have no effect, and names that mean something else.

    Raises:
        UsageError: the message says which.
    """
    if body.name in NO_NETWORKS:
        raise UsageError(
            f"network name {body.name} has another meaning in meshnet run --net: choose another"
        )
    for setting, value in (
        (Setting.PORT, body.port),
        (Setting.HOST_PREFIX, body.host_prefix),
        (Setting.HOST_PREFIX6, body.host_prefix6),
    ):
        if value is not None:
            check_setting(body.mode, setting)
    for setting, value, version in (
        (Setting.HOST_PREFIX, body.host_prefix, 4),
        (Setting.HOST_PREFIX6, body.host_prefix6, 6),
    ):
        if value is not None and version not in {s.version for s in subnets}:
            raise UsageError(
                f"{setting} {value} is for an IPv{version} subnet, and network {body.name} does "
                "not have one: leave it out"
            )


def _cidr(text: str) -> IpNetwork:
    try:
        return parse_network(text)
    except ValueError as error:
        raise UsageError(
            f"subnet {text!r} is not usable ({error}): give a CIDR such as 10.42.0.0/16"
        ) from error


def _range(text: str) -> AddressRange:
    first, _, last = text.partition("-")
    try:
        return AddressRange(parse_address(first), parse_address(last))
    except ValueError as error:
        raise UsageError(
            f"range {text!r} is not usable ({error}): give the first and the last address, such as "
            "192.0.2.100-192.0.2.199"
        ) from error


def _address(text: str) -> IpAddress:
    try:
        return parse_address(text)
    except ValueError as error:
        raise UsageError(
            f"address {text!r} is not an IP address: give one such as 10.42.1.7"
        ) from error
