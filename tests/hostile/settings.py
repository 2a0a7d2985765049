"""Hostile settings of the agent: a TOML file, the environment, the command line."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from meshnet.config import SETTINGS, load_config
from meshnet.errors import UsageError
from meshnet.store.etcd import EtcdConfig
from tests.hostile.campaign import TEXTS, Campaign, assert_clear, damage_bytes, pack, plain, unpack

if TYPE_CHECKING:
    from random import Random

_NAMES = [s.name for s in SETTINGS]
_SECRET = "hunter2"
_GOOD = f"""\
etcd = ["http://192.0.2.1:2379", "https://[fd00::1]"]
underlay-dev = "eth0"
host-id = "web-3"
grace = 3600
resync = 1.5
etcd-user = "root"
etcd-password = "{_SECRET}"
log-format = "json"
""".encode()
_VALUES = (
    *('"eth0"', "1", "-1", "1e400", "nan", "true", "[]", "{}", "[1]", "1979-05-27"),
    *("0x" + "f" * 5000, "9" * 5000, "[" * 3000, '"\\u0000"', '"\\uD800"', '"""', "'''x\n'''"),
    '"' + "x" * 5000 + '"',
    *("[[1]]", '"http://[::1"', '"http://h:99999"', "inf", f'["{_SECRET}"]'),
    '"http://ä.example\\u001b[2J"',
)  # fmt: skip


def _make(random: Random) -> bytes:
    """A file's text, and some variables of the environment."""
    lines = _GOOD.splitlines()
    for _ in range(random.randrange(3)):
        name, value = random.choice(_NAMES), random.choice(_VALUES)
        if name == "etcd" and random.randrange(2):
            value = f'"http://user:{_SECRET}@h"'
        line = f"{name} = {value}".encode("utf-8", "surrogatepass")
        at = random.randrange(len(lines))
        lines[at : at + random.randrange(2)] = [line]
    text = b"\n".join(lines)
    if random.randrange(3) == 0:
        text = damage_bytes(random, text)
    parts = [text]
    for _ in range(random.randrange(3)):
        variable = "MESHNET_" + random.choice((*_NAMES, "NONSENSE")).upper().replace("-", "_")
        value = json.dumps(random.choice(TEXTS))[1:-1] if random.randrange(2) else "1"
        raw = damage_bytes(random, value.encode()).replace(b"\0", b"")
        parts += [variable.encode(), raw]
    return pack(*parts)


def check(data: bytes) -> str:
    """Settings that the agent can start with, or one clear line without the secret."""
    text, *variables = unpack(data)
    try:
        toml = text.decode()
    except UnicodeDecodeError:
        return "no text"
    # As `os.environ` shows what is not UTF-8.
    pairs = [part.decode("utf-8", "surrogateescape") for part in variables]
    environment = dict(zip(pairs[::2], pairs[1::2], strict=False))
    try:
        config = load_config({}, environment, toml, hostname="box", toml_name="m.toml")
        assert _SECRET not in repr(config)
        etcd = EtcdConfig(
            endpoints=config.etcd,
            user=config.etcd_user,
            password=config.etcd_password if config.etcd_user else None,
        )
    except UsageError as error:
        assert_clear(str(error).replace(_SECRET, "\0"))  # which is not clear
        return "refused"
    assert _SECRET not in repr(etcd)
    for name in (*config.etcd, config.run_dir, config.state_dir, config.etcd_password or ""):
        name.encode()
        assert "\0" not in name
    return "taken"


SETTINGS_FILES = Campaign("settings", _make, plain(check), 900)
