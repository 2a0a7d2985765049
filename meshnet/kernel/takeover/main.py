"""The program: ``python -m meshnet.kernel.takeover take|settle|return --state-dir DIR …``.

``take`` makes a bridge, moves a link's contents to it and leaves them there if the gateway and etcd
answer through it in time; otherwise, and whenever something fails, it moves everything back.  It
does nothing over a takeover that stands, and first undoes one that was cut short.  ``settle``
undoes what was cut short or taken apart, and leaves what stands; ``return`` moves everything back.

It works in the network namespace that it is started in, as a separate process in a separate
session: if its starter is killed, the host is still not cut off.  Its last line says why it failed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from meshnet.errors import ConflictError, KernelRefusedError, MeshnetError, PolicyRefusedError
from meshnet.kernel.takeover.confirm import ETCD, find_silent, name_of
from meshnet.kernel.takeover.interface import Interfaces, generation_of
from meshnet.kernel.takeover.journal import Journal, JournalDir, Stage
from meshnet.kernel.takeover.plan import plan_giving_back, plan_taking
from meshnet.kernel.takeover.standing import stands
from meshnet.kernel.wire import links
from meshnet.system.proc import boot_id

if TYPE_CHECKING:
    from collections.abc import Sequence

    from meshnet.model import IpAddress

_BEFORE_S = 1.0
"""For gateways and etcd to answer before anything is changed."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit status (docs/cli.md)."""
    options = _parser().parse_args(argv)
    with contextlib.suppress(PermissionError):  # it leads a session already
        os.setsid()
    # Half a takeover leaves the host cut off: a signal must not stop it midway, nor a write to a
    # standard error that its starter has closed.
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    journals = JournalDir(Path(options.state_dir))
    try:
        with contextlib.closing(Interfaces()) as interfaces:
            if options.verb == "take":
                takeover = Takeover(interfaces, journals, options.bridge)
                gateways = [ip_address(text) for text in options.gateway]
                etcd = [_host_and_port(text) for text in options.etcd]
                takeover.take_over(options.parent, gateways, etcd, options.confirm)
            else:
                for bridge in [options.bridge] if options.bridge else journals.bridges():
                    takeover = Takeover(interfaces, journals, bridge)
                    if options.verb == "settle":
                        takeover.settle()
                    else:
                        takeover.give_back()
    except MeshnetError as error:
        print(f"meshnet.kernel.takeover: {error}", file=sys.stderr)
        return error.exit_status
    return 0


class Takeover:
    """One bridge, and the link it takes."""

    def __init__(self, interfaces: Interfaces, journals: JournalDir, bridge: str) -> None:
        self._interfaces = interfaces
        self._journals = journals
        self._bridge = bridge

    def take_over(
        self,
        parent: str,
        gateways: Sequence[IpAddress],
        etcd: Sequence[tuple[str, int]],
        confirm_s: float,
    ) -> None:
        """Put a bridge in the place of a link, confirmed; or leave everything as it was.

        Args:
            gateways: routers that must answer through it, besides those of default routes.
            etcd: host and port of etcd's members, of which one must answer.
            confirm_s: seconds in which they must answer.

        Raises:
            NotFoundError: the link does not exist.
            ConflictError: the link cannot be taken.
            PolicyRefusedError: the gateway or etcd did not answer, before or after.
            KernelRefusedError: the kernel refused, or the journal cannot be written.
        """
        with self._journals.locked(self._bridge):
            journal = self._journals.load(self._bridge)
            if journal is not None:
                if journal.parent == parent and stands(journal, self._interfaces):
                    return
                self._undo(journal)
            link = self._interfaces.check_movable(parent)
            if self._interfaces.find(self._bridge) is not None:
                raise ConflictError(f"link {self._bridge} exists and has no journal: remove it")
            held = self._interfaces.read(parent)
            asked = _find_answering(parent, gateways, held.gateways, etcd)
            journal = Journal(
                bridge=self._bridge,
                parent=parent,
                stage=Stage.MOVING,
                contents=held,
                generation=generation_of(parent),
                boot=boot_id(),
            )
            # On disk before the first change: whoever finds the journal after a crash knows what
            # to give back.
            self._journals.save(journal)
            try:
                self._interfaces.make_bridge(self._bridge, parent, link)
                self._move(journal)
                self._journals.save(journal.at(Stage.MOVED))
                silent = trio.run(find_silent, self._bridge, asked, etcd, confirm_s)
                if silent:
                    raise PolicyRefusedError(
                        f"{' and '.join(silent)} did not answer through bridge {self._bridge} "
                        f"within {confirm_s:g} s: {parent} has everything back"
                    )
                self._journals.save(journal.at(Stage.CONFIRMED))
            except BaseException:
                self._undo(journal)
                raise

    def settle(self) -> None:
        """Undo a takeover that does not stand.

        Raises:
            KernelRefusedError: the kernel refused; the journal stays.
        """
        with self._journals.locked(self._bridge):
            journal = self._journals.load(self._bridge)
            if journal is not None and not stands(journal, self._interfaces):
                self._undo(journal)

    def give_back(self) -> None:
        """Move everything that the bridge has now to its parent, and remove it.  Idempotent.

        Raises:
            ConflictError: endpoints hang on it.
            KernelRefusedError: the kernel refused; the journal stays.
        """
        with self._journals.locked(self._bridge):
            journal = self._journals.load(self._bridge)
            if journal is None:
                return
            if self._interfaces.has_endpoints(self._bridge):
                raise ConflictError(f"endpoints hang on bridge {self._bridge}: detach them first")
            self._undo(journal)

    def _move(self, journal: Journal) -> None:
        bridge, parent, held = journal.bridge, journal.parent, journal.contents
        # Otherwise the kernel gives the port IPv6 addresses whenever its carrier comes back.
        self._interfaces.set_generation(parent, links.ADDR_GEN_NONE)
        self._interfaces.carry_out(plan_taking(parent, bridge, held), parent, bridge)
        if self._interfaces.read(bridge).lasting != held.lasting:
            raise KernelRefusedError(f"bridge {bridge} did not get what {parent} had")

    def _undo(self, journal: Journal) -> None:
        """Give the parent back what it had, remove the bridge, forget the journal."""
        bridge, parent = journal.bridge, journal.parent
        on_bridge, link = self._interfaces.read(bridge), self._interfaces.find(parent)
        on_parent = self._interfaces.read(parent)
        if self._interfaces.find(bridge) is None:
            # The bridge is gone, with what it had.  Nothing is to be given back if somebody has
            # done so, if the parent is gone, too, or if the machine has booted since: then its own
            # network configuration has set the parent up.
            if link is None or on_parent.addresses or journal.boot != boot_id():
                self._journals.remove(bridge)
                return
        elif journal.stage is Stage.CONFIRMED:
            # What the bridge has counts: a DHCP client may have renewed on it since.  Saved, since
            # a crash halfway leaves a bridge that has lost a part of it.
            journal = journal.at(Stage.RETURNING, on_bridge)
            self._journals.save(journal)
        if link is None:
            raise ConflictError(
                f"link {parent}, whose addresses bridge {bridge} holds, does not exist: create it, "
                "or remove the bridge"
            )
        batches = plan_giving_back(
            parent,
            bridge,
            journal.contents,
            on_parent,
            on_bridge,
            is_port=link.master == bridge,
        )
        self._interfaces.carry_out(batches, parent, bridge)
        self._interfaces.remove(bridge)
        self._interfaces.set_generation(parent, journal.generation)
        self._journals.remove(bridge)


def _find_answering(
    link: str,
    named: Sequence[IpAddress],
    others: Sequence[IpAddress],
    etcd: Sequence[tuple[str, int]],
) -> list[IpAddress]:
    """The gateways to ask again afterwards: those named, and those of the others that answer now.

    Raises:
        PolicyRefusedError: nothing answers that could tell a failed takeover from a good one.
    """
    gateways = list(dict.fromkeys((*named, *others)))
    silent = trio.run(find_silent, link, gateways, etcd, _BEFORE_S)
    # A default route's router may never answer ARP.  That alone does not prevent a takeover, as
    # long as another router answers.
    answering = [g for g in gateways if name_of(g) not in silent]
    needed = {name_of(g) for g in (named if answering else gateways)} | {ETCD}
    missing = [who for who in silent if who in needed]
    if missing:
        raise PolicyRefusedError(
            f"{' and '.join(missing)} did not answer on link {link} within {_BEFORE_S:g} s, before "
            "anything was changed: without an answer now, a failed takeover could not be noticed"
        )
    return answering


def _host_and_port(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m meshnet.kernel.takeover", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    take = verbs.add_parser("take", help="put a bridge in the place of a link")
    take.add_argument("--parent", required=True, help="the link")
    take.add_argument("--gateway", action="append", default=[], help="must answer through it")
    take.add_argument("--etcd", action="append", default=[], help="HOST:PORT; one must answer")
    take.add_argument("--confirm", type=float, default=5.0, help="seconds for them to answer")
    settle = verbs.add_parser("settle", help="undo what was cut short")
    give_back = verbs.add_parser("return", help="move everything back")
    for verb in (take, settle, give_back):
        verb.add_argument("--state-dir", required=True, help="the agent's state directory")
        verb.add_argument("--bridge", required=verb is take, help="name of the bridge")
    return parser
