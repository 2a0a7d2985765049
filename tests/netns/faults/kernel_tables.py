"""Reads a kernel's objects as lines of text, as `tests.netns.faults.wanted` writes them.

Only those that could be the product's: by the name of their link, by routing protocol 109, by a
nexthop id of its range, by the name of the nftables tables.
"""

from __future__ import annotations

import json
from collections import Counter
from ipaddress import IPv6Address, ip_network
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from tests.netns.faults.observation import Document, Kernel

_PROTOCOL = "109"
_NEXTHOP_IDS = range(0x6D00_0000, 0x6E00_0000)
_TABLE = "meshnet"


def is_ours(link: object) -> bool:
    """Whether a link's name is one of the product's."""
    return str(link).startswith("mn")


def links(kernel: Kernel) -> Iterator[str]:
    """Its links."""
    for link in kernel.links:
        if not is_ours(name := link["ifname"]):
            continue
        info = link.get("linkinfo", {})
        kind, data = info.get("info_kind"), info.get("info_data", {})
        state = f"mtu {link['mtu']}{' up' if 'UP' in link['flags'] else ' down'}"
        if kind == "veth":
            hairpin = info.get("info_slave_data", {}).get("hairpin")
            yield f"veth {name} of {link.get('master')} {state}{' hairpin' if hairpin else ''}"
        elif kind == "vxlan":
            local = data.get("local", data.get("local6"))
            learning = "" if data.get("learning") else " nolearning"
            yield (
                f"vxlan {name} mac {link.get('address', 'none')} {state} vni {data.get('id')} "
                f"port {data.get('port')} local {local}{learning}"
            )
        else:
            yield f"{kind} {name} mac {link.get('address', 'none')} {state}"


def addresses(kernel: Kernel) -> Iterator[str]:
    """Addresses on its links."""
    for link in kernel.links:
        if is_ours(link["ifname"]):
            yield from _addresses(link)


def _addresses(link: Document) -> Iterator[str]:
    for row in link["addr_info"]:
        bad = [flag for flag in ("dadfailed", "tentative", "deprecated") if row.get(flag)]
        text = f"{row['local']}/{row['prefixlen']} on {link['ifname']}"
        yield " ".join((text, *bad))


def routes(kernel: Kernel) -> Iterator[str]:
    """Its routes; one that does not lead through a nexthop object says so."""
    by_id = {row["id"]: row for row in kernel.nexthops}
    for row in kernel.routes:
        dev = row.get("dev", "")
        if row["protocol"] != _PROTOCOL and (row["protocol"] == "kernel" or not is_ours(dev)):
            continue
        text = f"{row['type']} {_destination(row['dst'])}"
        if row["type"] == "unicast":
            nexthop = by_id.get(row.get("nhid"))
            text += " " + (_via(nexthop) if nexthop else f"{_via(row)} without a nexthop object")
            text += f" from {row.get('prefsrc')}"
        if row.get("table", "main") != "main":
            text += f" in table {row['table']}"
        yield text


def _destination(text: str) -> str:
    return text if text == "default" else str(ip_network(text))


def _via(row: Mapping[str, Any]) -> str:
    return f"via {row.get('gateway')} on {row.get('dev')}"


def nexthops(kernel: Kernel) -> Iterator[str]:
    """Its nexthop objects."""
    for row in kernel.nexthops:
        if row["id"] in _NEXTHOP_IDS or row.get("protocol") == _PROTOCOL:
            yield _via(row)


def neighbours(kernel: Kernel) -> Iterator[str]:
    """Neighbours on VTEPs, and those on bridges that somebody put there."""
    for row in kernel.neighbours:
        dev, permanent = row["dev"], "PERMANENT" in row["state"]
        if is_ours(dev) and (permanent or not dev.startswith("mnb")):
            text = f"{row['dst']} on {dev} at {row.get('lladdr')}"
            yield text if permanent else f"{text} {' '.join(row['state'])}"


def learned_neighbours(kernel: Kernel) -> Iterator[tuple[str, str]]:
    """Address and MAC of what bridges of ours found out by asking."""
    for row in kernel.neighbours:
        if row["dev"].startswith("mnb") and "PERMANENT" not in row["state"] and "lladdr" in row:
            yield row["dst"], row["lladdr"]


def fdb(kernel: Kernel) -> Iterator[str]:
    """FDB entries of VTEPs."""
    for row in kernel.fdb:
        if row["ifname"].startswith("mnv"):
            yield f"{row['mac']} on {row['ifname']} at {row.get('dst')}"


def learned_macs(kernel: Kernel) -> Iterator[tuple[str, str]]:
    """Port and MAC of what bridges of ours learned, or were told."""
    for row in kernel.fdb:
        if row.get("master", "").startswith("mnb") and row["state"] != "permanent":
            yield row["ifname"], row["mac"]


def tables(kernel: Kernel) -> list[str]:
    """Its nftables tables."""
    found = (item["table"] for item in kernel.nft if "table" in item)
    return [f"{row['family']} {row['name']}" for row in found if row["name"] == _TABLE]


def elements(kernel: Kernel) -> Iterator[str]:
    """The elements of its named sets and maps."""
    for item in kernel.nft:
        named = item.get("set") or item.get("map")
        if named is None or named["table"] != _TABLE:
            continue
        for element in named.get("elem", ()):
            yield f"{named['family']} {named['name']}: {' '.join(_flat(element))}"


def _flat(value: Any) -> Iterator[str]:  # noqa: ANN401
    """The parts of an element: of a concatenation, and of a map's key and value."""
    if isinstance(value, dict):
        for inner in value.values():
            yield from _flat(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _flat(inner)
    elif isinstance(value, str) and value.startswith("0x"):
        yield str(IPv6Address(int(value, 16)))
    else:
        yield str(value)


def rules(kernel: Kernel, own: Mapping[str, str]) -> list[str]:
    """Its chains and rules, the same on every host but for the names of what is a host's own.

    Args:
        own: the host's address and subnets, and what they are called in the result.
    """
    found = []
    for item in kernel.nft:
        for kind in ("chain", "rule"):
            row = item.get(kind)
            if row is not None and row["table"] == _TABLE:
                found.append(kind + " " + _canonical(_neutral(row, own)))
    return found


def _neutral(value: Any, own: Mapping[str, str]) -> Any:  # noqa: ANN401
    if isinstance(value, dict):
        inner = {k: _neutral(v, own) for k, v in value.items() if k != "handle"}
        if "addr" in inner and "len" in inner:
            return _neutral(f"{inner['addr']}/{inner['len']}", own)
        if isinstance(inner.get("set"), list):
            inner["set"] = sorted(inner["set"], key=_canonical)
        return inner
    if isinstance(value, list):
        return [_neutral(v, own) for v in value]
    return own.get(value, value) if isinstance(value, str) else value


def _canonical(value: Any) -> str:  # noqa: ANN401
    return json.dumps(value, sort_keys=True)


def endpoint_links(kernel: Kernel) -> Iterator[str]:
    """The links of an endpoint's namespace, but for ``lo``."""
    for link in kernel.links:
        if link["ifname"] != "lo":
            state = f"mtu {link['mtu']}{' up' if 'UP' in link['flags'] else ' down'}"
            kind = link.get("linkinfo", {}).get("info_kind")
            yield f"{kind} {link['ifname']} mac {link.get('address', 'none')} {state}"


def endpoint_addresses(kernel: Kernel) -> Iterator[str]:
    """The addresses there."""
    for link in kernel.links:
        if link["ifname"] != "lo":
            yield from _addresses(link)


def endpoint_routes(kernel: Kernel) -> Iterator[str]:
    """The routes there that the kernel did not make by itself."""
    for row in kernel.routes:
        if row["protocol"] not in ("kernel", "ra") or row.get("table", "main") != "main":
            if row.get("table") == "local":
                continue
            yield f"{row['type']} {_destination(row['dst'])} {_via(row)}"


def differences(where: str, kind: str, wanted: Iterable[str], found: Iterable[str]) -> list[str]:
    """Sentences about what is missing, has no owner, or is there more than once."""
    expected, there = Counter(iter(wanted)), Counter(iter(found))
    sentences = []
    for line in sorted(expected | there):
        if there[line] < expected[line]:
            sentences.append(f"{where}: {kind} is missing: {line}")
        elif line not in expected:
            sentences.append(f"{where}: {kind} without an owner: {line}")
        elif there[line] > expected[line]:
            sentences.append(f"{where}: {kind} is there {there[line]} times: {line}")
    return sentences
