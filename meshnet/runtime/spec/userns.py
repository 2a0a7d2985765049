"""``--userns``: whether a container has user and group ids of its own, and which.  Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from meshnet.errors import UsageError
from meshnet.runtime.spec.id_ranges import IdRange, parse_range
from meshnet.runtime.spec.options import shared_with

if TYPE_CHECKING:
    from meshnet.runtime.spec.options import ContainerOptions

_AUTO = "auto:"


@dataclass(frozen=True, slots=True)
class Userns:
    """A user namespace that is wanted; with nothing said the host's.

    Attributes:
        auto: one of its own, its ids chosen by the agent.
        ids: one of its own, with these ids of the host.
        container: that of another container.
    """

    auto: bool = False
    ids: IdRange | None = None
    container: str | None = None


def parse_userns(text: str) -> Userns:
    """``host``, ``auto``, ``auto:FIRST:SIZE`` or ``container:NAME``.

    Raises:
        UsageError: anything else.
    """
    if text == "host":
        return Userns()
    if text == "auto":
        return Userns(auto=True)
    if text.startswith(_AUTO):
        return Userns(ids=parse_range(text.removeprefix(_AUTO), "the range of --userns"))
    name = shared_with(text)
    if name:
        return Userns(container=name)
    raise UsageError(
        f"user namespace {text!r} is unknown: host, auto, auto:FIRST:SIZE or container:NAME"
    )


def check_userns(options: ContainerOptions) -> None:
    """Refuse what root of a user namespace may not have; the same as Docker refuses.

    Raises:
        UsageError: the message says which option it is.
    """
    if parse_userns(options.userns) == Userns():
        return
    refused = (
        ("--privileged", options.privileged),
        ("--net host", "host" in options.networks),
        ("--pid host", options.pid == "host"),
    )
    for option, given in refused:
        if given:
            raise UsageError(
                f"{option} needs the host's root, which --userns {options.userns} takes away: "
                "give one of them"
            )
