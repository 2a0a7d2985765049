"""Settings: where they come from, which wins, and what is refused."""

from __future__ import annotations

import contextlib
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnet.config import SETTINGS, load_config
from meshnet.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from meshnet.config import AgentConfig

REQUIRED = {"etcd": "http://e1:2379", "underlay-ip": "10.9.0.1"}


def load(
    arguments: Mapping[str, str | None] = REQUIRED,
    environment: Mapping[str, str] | None = None,
    toml: str | None = None,
) -> AgentConfig:
    return load_config(arguments, environment or {}, toml, hostname="box", toml_name="m.toml")


def test_defaults() -> None:
    config = load()
    assert config.etcd == ("http://e1:2379",)
    assert config.underlay_ip == ip_address("10.9.0.1")
    assert config.underlay_dev is None
    assert config.host_id == "box"
    assert (config.lease_ttl_s, config.grace_s, config.resync_s) == (15, 3600, 60)
    assert (config.run_dir, config.state_dir) == ("/run/meshnet", "/var/lib/meshnet")
    assert (config.vxlan, config.log_level, config.log_format) == ("auto", "info", "text")
    assert config.vtep_engine == "auto"
    assert config.etcd_password is None


def test_the_command_line_wins_over_the_environment_and_that_over_the_file() -> None:
    toml = 'host-id = "file"\ngrace = 1\nresync = 1\n'
    environment = {"MESHNET_HOST_ID": "env", "MESHNET_GRACE": "2"}
    config = load({**REQUIRED, "host-id": "cli", "grace": None}, environment, toml)
    assert (config.host_id, config.grace_s, config.resync_s) == ("cli", 2, 1)


def test_several_etcd_urls() -> None:
    urls = ("http://a:1", "http://b:2")
    assert load({**REQUIRED, "etcd": "http://a:1, http://b:2"}).etcd == urls
    toml = 'etcd = ["http://a:1", "http://b:2"]\nunderlay-dev = "eth0"'
    assert load({}, {}, toml).etcd == urls


def test_numbers_of_the_file_may_be_numbers_or_text() -> None:
    assert load(toml="grace = 1.5").grace_s == load(toml='grace = "1.5"').grace_s == 1.5


@pytest.mark.parametrize(
    "toml",
    ["colour = 1", "lease_ttl = 3", "[agent]\netcd = 1", "grace = true", "grace = [1]", "grace =",
     "etcd = { a = 1 }", "grace = 1979-05-27"],
)  # fmt: skip
def test_files_that_are_refused(toml: str) -> None:
    with pytest.raises(UsageError, match=r"m\.toml"):
        load(toml=toml)


def test_unknown_variables_are_refused_and_others_programs_pass() -> None:
    load(environment={"PATH": "/bin", "MESHNET_SOCKET": "/s", "MESHNET_CONFIG": "/c"})
    with pytest.raises(UsageError, match="MESHNET_LEASE_TLL"):
        load(environment={"MESHNET_LEASE_TLL": "3"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"etcd": None}, "etcd"),
        ({"etcd": ","}, "etcd"),
        ({"underlay-ip": None}, "underlay"),
        ({"underlay-dev": "eth0"}, "both are given"),
        ({"underlay-ip": "10.9.0.300"}, "10.9.0.300"),
        ({"host-id": "a/b"}, "a/b"),
        ({"lease-ttl": "1"}, "lease-ttl"),
        ({"lease-ttl": "soon"}, "soon"),
        ({"grace": "-1"}, "grace"),
        ({"grace": "nan"}, "grace"),
        ({"grace": "inf"}, "grace"),
        ({"resync": "0"}, "resync"),
        ({"vxlan": "hardware"}, "auto, kernel, userspace"),
        ({"log-level": "loud"}, "debug, info"),
        ({"etcd-cert": "c.pem"}, "--etcd-key"),
        ({"etcd-key": "k.pem"}, "--etcd-cert"),
    ],
)
def test_values_that_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as refused:
        load({**REQUIRED, **arguments})
    assert "\n" not in str(refused.value)


def test_messages_name_the_source() -> None:
    for given_in, source in (
        ({"environment": {"MESHNET_RESYNC": "0"}}, "the environment"),
        ({"toml": "resync = 0"}, "m.toml"),
        ({"arguments": {**REQUIRED, "resync": "0"}}, "the command line"),
    ):
        with pytest.raises(UsageError, match=source):
            load(**given_in)


def test_the_password_is_not_shown() -> None:
    config = load(environment={"MESHNET_ETCD_PASSWORD": "hunter2"})
    assert config.etcd_password == "hunter2"
    assert "hunter2" not in repr(config)
    assert [s.name for s in SETTINGS if s.secret] == ["etcd-password"]


@given(st.sampled_from([s.name for s in SETTINGS]), st.text(max_size=20))
def test_any_text_is_taken_or_refused(name: str, value: str) -> None:
    with contextlib.suppress(UsageError):
        load({**REQUIRED, name: value})


@given(st.text(max_size=60))
def test_any_file_is_taken_or_refused(text: str) -> None:
    with contextlib.suppress(UsageError):
        load(toml=text)


def test_a_setting_that_swallowed_the_secrets_line_is_not_repeated() -> None:
    swallowed = 'vxlan = """\netcd-password = "hunter2"\n"""'
    for toml in (swallowed, 'etcd-password = ["hunter2"]', 'etcd = "http://root:hunter2@h"'):
        try:
            shown = repr(load({"underlay-ip": "10.9.0.1", "etcd": None}, toml=toml))
        except UsageError as error:
            shown = str(error)
        assert "hunter2" not in shown


@pytest.mark.parametrize(
    ("environment", "toml", "message"),
    [
        ({"MESHNET_ETCD_PASSWORD": "hunter2\udcff"}, None, "not UTF-8"),
        ({"MESHNET_ETCD_PASSWORD": "hunter2\n"}, None, "line break"),
        ({}, 'state-dir = "hunter2\\u0000"', "NUL"),
        ({}, "grace = " + "9" * 5000, r"m\.toml"),
        ({}, "grace = 0x" + "f" * 5000, "out of range"),
        ({}, "grace = " + "[" * 5000, r"m\.toml"),
    ],
)
def test_values_that_are_refused_and_not_repeated(
    environment: dict[str, str], toml: str | None, message: str
) -> None:
    with pytest.raises(UsageError, match=message) as refused:
        load(environment=environment, toml=toml)
    assert "hunter2" not in str(refused.value)
    assert len(str(refused.value)) < 500


def test_an_empty_value_is_the_default() -> None:
    assert load(environment={"MESHNET_RUN_DIR": ""}).run_dir == "/run/meshnet"
