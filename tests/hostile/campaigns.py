"""All campaigns."""

from __future__ import annotations

from tests.hostile import api, datapath, disk, netlink, settings, store

CAMPAIGNS = (
    store.VALUES,
    store.STORE,
    settings.SETTINGS_FILES,
    netlink.ANSWERS,
    netlink.NOTIFICATIONS,
    datapath.DATAGRAMS,
    datapath.CONTROL,
    disk.DISK,
    api.API,
)
