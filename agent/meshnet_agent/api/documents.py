"""The JSON documents of the API: a contract with scripts (docs/cli.md).

Fields may be added, not renamed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from meshnet.model import Datapath, Mode
from meshnet.runtime.images.oci import ImageConfig

if TYPE_CHECKING:
    from collections.abc import Mapping

    from meshnet.model import Endpoint, Host, MeshSnapshot, Network, NetworkName
    from meshnet.runtime.images.store import Image, Removed

Document = dict[str, Any]


def network_document(network: Network, mtu_bytes: int | None) -> Document:
    """A network; `mtu_bytes` is what its endpoints get on this host, None while unknown."""
    has_ipv4 = network.subnets[0].version == 4
    return {
        "name": network.name,
        "mode": network.mode,
        "subnets": [str(s) for s in network.subnets],
        "vni": network.vni,
        "port": network.port if network.mode.is_overlay else None,
        "mtu": network.mtu_bytes if network.mtu_bytes is not None else mtu_bytes,
        "host_prefix": network.host_prefix if has_ipv4 else network.host_prefix6,
        "host_prefix6": network.host_prefix6,
        "direct_routing": network.direct_routing,
        "fallback": "auto" if network.fallback else "never",
        "parent": network.parent,
        "ranges": [str(r) for r in network.ranges],
        "gateways": [str(g) for g in network.gateways],
        "internal": network.internal,
        "host_access": network.host_access,
    }


def endpoint_document(endpoint: Endpoint) -> Document:
    """An endpoint; `address6` where it has both IP versions; a gateway of None is none."""
    gateways = {gateway.version: str(gateway) for gateway in endpoint.gateways}
    document: Document = {
        "id": endpoint.id,
        "network": endpoint.network,
        "host": endpoint.host,
        "name": endpoint.name,
        "pid": endpoint.sandbox.pid,
        "ifname": endpoint.ifname,
        "address": str(endpoint.addresses[0]),
        "gateway": gateways.get(endpoint.addresses[0].version),
        "mac": endpoint.mac.hex(":"),
        "mtu": endpoint.mtu_bytes,
        "default_route": endpoint.default_route,
        "published": [str(port) for port in endpoint.published],
    }
    if len(endpoint.addresses) > 1:
        document["address6"] = str(endpoint.addresses[1])
        document["gateway6"] = gateways.get(6)
    return document


def host_document(
    host: Host,
    snapshot: MeshSnapshot,
    path: Mapping[NetworkName, str],
    path_why: Mapping[NetworkName, str],
) -> Document:
    """A host.  A dual-stack network's IPv6 subnet is in `subnets6`.

    Args:
        path: by network, how packets to it leave this host.
        path_why: why, where it is not what the network's mode is.
    """
    subnets: dict[NetworkName, str] = {}
    subnets6: dict[NetworkName, str] = {}
    for name in snapshot.networks:
        owned = snapshot.subnets_of(host.id, name)
        if owned:
            subnets[name] = str(owned[0])
        if len(owned) > 1:
            subnets6[name] = str(owned[1])
    return {
        "id": host.id,
        "underlay_ip": str(host.underlay_ip),
        "alive": host.id in snapshot.alive,
        "subnets": subnets,
        "subnets6": subnets6,
        "datapath": {
            name: Datapath.USERSPACE if snapshot.networks[name].mode is Mode.UDP else host.datapath
            for name in subnets
            if snapshot.networks[name].mode in (Mode.VXLAN, Mode.UDP)
        },
        "path": path,
        "path_why": path_why,
    }


def image_document(image: Image) -> Document:
    """An image; `size_bytes` is that of its layers, which it may share with others."""
    return {
        "id": image.id,
        "names": image.names,
        "size_bytes": image.size_bytes,
        "created": image.document.created,
        "layers": len(image.layers),
        "in_use": bool(image.containers),
        "containers": image.containers,
    }


def image_details(image: Image) -> Document:
    """An image, with what it is made of and how it wants to be run."""
    config = image.document.config or ImageConfig()
    return image_document(image) | {
        "digest": image.manifest.digest,
        "os": image.document.os,
        "architecture": image.document.architecture,
        "diff_ids": image.layers,
        "config": {
            "entrypoint": config.entrypoint or (),
            "cmd": config.cmd or (),
            "env": config.env or (),
            "user": config.user or "",
            "working_dir": config.working_dir or "",
            "volumes": sorted(config.volumes or ()),
            "exposed_ports": sorted(config.exposed_ports or ()),
            "stop_signal": config.stop_signal or "",
            "labels": config.labels or {},
        },
    }


def removed_document(removed: Removed) -> Document:
    """What removing an image or a name of it did."""
    return {"id": removed.id, "untagged": removed.untagged, "deleted": removed.deleted}
