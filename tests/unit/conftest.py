"""What unit tests share: processes to attach, and the settings of hypothesis.

Those are deterministic, without a deadline on a busy machine.
"""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from collections.abc import Iterator

settings.register_profile(
    "unit",
    deadline=None,
    max_examples=60,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("unit")


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    """A process of this machine's own network namespace."""
    with subprocess.Popen(["sleep", "60"]) as child:
        yield child
        child.kill()


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the agent this machine's own network namespace, which all processes are in, is any."""
    monkeypatch.setattr("meshnet_agent.endpoints.sandbox.host_netns", set)
