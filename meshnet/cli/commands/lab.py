"""``meshnet lab``: a mesh of several hosts on this one machine, to try things out.

The hosts are network namespaces (`meshnet.lab`).  Unlike the other command groups this one calls
does not call an agent: it starts them.  Each command imports what it needs, because the client must
start fast.
"""

from __future__ import annotations

import argparse
import os
import sys

# typing.TYPE_CHECKING without importing typing, which takes longer than this whole file.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path

    from meshnet.lab.state import LabDocument
    from meshnet.lab.topology import Lab

_LAB_HELP = "run a mesh of several hosts on this machine"
_LAB_DESCRIPTION = """\
Run a whole mesh on this machine. Every "host" is a network namespace with its own agent. A switch,
which is another namespace, connects them with each other and with an etcd. The agents, kernel
devices and packets are real. The machine's own network namespace stays untouched."""
_LAB_EPILOG = """\
example, as root:
  meshnet lab up --hosts 3
  meshnet lab exec h1 -- meshnet hosts
  meshnet lab down"""

_UP_DESCRIPTION = """\
Make the hosts h1, h2, ..., start etcd and an agent on every host, and wait until all are ready.
If anything fails, all of it is removed again. Several labs can be up under different names."""
_UP_EPILOG = """\
examples:
  meshnet lab up
  meshnet lab up --hosts 5 --name wide --underlay ipv6 --mtu 9000"""

_EXEC_DESCRIPTION = """\
Run a command in a host's network namespace, as a shell on that host would. MESHNET_SOCKET names
the host's agent, so that 'meshnet' there talks to it; MESHNET_ETCD is etcd's URL. The exit status
is the command's own. HOST may also be 'sw', the switch (its bridge is br0, and its ports have the
hosts' names), or 'etcd' (with three members also 'etcd2' and 'etcd3'). Options go before HOST."""
_EXEC_EPILOG = """\
examples:
  meshnet lab exec h1 -- meshnet network create prod --subnet 10.42.0.0/16 --mode vxlan
  meshnet lab exec h1 -- ip route
  meshnet lab exec sw -- tcpdump -ni br0 udp port 4789"""

_DOWN_DESCRIPTION = """\
End every process of a lab, and remove its namespaces and directory. This is harmless when the lab
is not up, and cleans up after an interrupted 'up' or 'down'."""
_DOWN_EPILOG = """\
example:
  meshnet lab down --name wide"""

_LS_DESCRIPTION = "List the labs that are up on this machine."
_LS_EPILOG = """\
example:
  meshnet lab ls --json"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``lab`` and its commands to the program's commands."""
    lab = _command(subparsers, "lab", _LAB_HELP, _LAB_DESCRIPTION, _LAB_EPILOG)
    commands = lab.add_subparsers(prog=lab.prog, metavar="COMMAND", required=True)

    up = _command(commands, "up", "make the hosts and start them", _UP_DESCRIPTION, _UP_EPILOG)
    up.add_argument(
        "--hosts", type=int, default=3, metavar="N", help="make N hosts (default: %(default)s)"
    )
    _add_name(up)
    up.add_argument(
        "--underlay",
        choices=("ipv4", "ipv6"),
        default="ipv4",
        help="choose the address family between the hosts (default: %(default)s)",
    )
    up.add_argument(
        "--mtu",
        type=int,
        default=1500,
        metavar="BYTES",
        help="set the MTU between the hosts (default: %(default)s)",
    )
    up.add_argument(
        "--etcd-members",
        type=int,
        choices=(1, 3),
        default=1,
        help="run etcd with so many members, each with its own address (default: %(default)s)",
    )
    _add_json(up)
    up.set_defaults(run=run_up)

    execute = _command(commands, "exec", "run a command on a host", _EXEC_DESCRIPTION, _EXEC_EPILOG)
    execute.usage = "%(prog)s [--name NAME] HOST -- CMD..."
    _add_name(execute)
    execute.add_argument("host", metavar="HOST", help="h1, h2, ..., sw or etcd")
    execute.add_argument(
        "command", metavar="CMD", nargs=argparse.REMAINDER, help="the command and its arguments"
    )
    execute.set_defaults(run=run_exec)

    down = _command(commands, "down", "remove a lab", _DOWN_DESCRIPTION, _DOWN_EPILOG)
    _add_name(down)
    _add_json(down)
    down.set_defaults(run=run_down)

    ls = _command(commands, "ls", "list the labs that are up", _LS_DESCRIPTION, _LS_EPILOG)
    _add_json(ls)
    ls.set_defaults(run=run_ls)


def run_up(args: argparse.Namespace) -> int:
    """Run ``meshnet lab up``."""
    from meshnet.cli.output import print_json, print_table
    from meshnet.lab.topology import Lab
    from meshnet.lab.underlay import LabUnderlay

    lab = Lab(
        args.name,
        hosts=args.hosts,
        underlay=LabUnderlay(6 if args.underlay == "ipv6" else 4, args.mtu),
        etcd_members=args.etcd_members,
    )
    lab.up(None if args.json else _say)
    if args.json:
        print_json(_describe(lab))
        return 0
    rows = [(host.name, host.underlay_ip, host.netns, host.socket_path) for host in lab.hosts]
    print_table(("HOST", "UNDERLAY", "NAMESPACE", "SOCKET"), rows)
    if rows:
        name = "" if args.name == "lab" else f"--name {args.name} "
        _say(f"try: meshnet lab exec {name}{rows[0][0]} -- meshnet hosts")
    return 0


def run_exec(args: argparse.Namespace) -> int:
    """Run ``meshnet lab exec``: become the command, and return only with an error."""
    import signal

    from meshnet.errors import NotFoundError, UsageError
    from meshnet.lab import netns, state

    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        raise UsageError(f"no command for lab host {args.host}: add '-- CMD...'")
    if command is args.command and command[0].startswith("-"):
        raise UsageError(
            f"option {command[0]} after HOST: put options before HOST, and '--' before the command"
        )
    netns.check_lab_name(args.name)
    base_dir = state.default_base_dir(args.name)
    document = _read_lab(args.name, base_dir)
    if args.host == netns.SWITCH or args.host in document.etcds:
        environment = {"MESHNET_ETCD": document.etcd_url}
    else:
        document.host(args.host)
        environment = state.host_environment(base_dir, args.host, document.etcd_url)
    netns.set_netns(netns.netns_path(netns.netns_name(args.name, args.host)))
    # Python ignores these two, and exec keeps ignored signals ignored: 'yes | head' would never
    # end.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    sys.stdout.flush()
    try:
        os.execvpe(command[0], command, {**os.environ, **environment})
    except FileNotFoundError as exc:
        raise NotFoundError(f"command {command[0]!r} is not installed on this machine") from exc
    except OSError as exc:
        raise UsageError(f"command {command[0]!r} cannot be run: {exc.strerror}") from exc


def run_down(args: argparse.Namespace) -> int:
    """Run ``meshnet lab down``."""
    from meshnet.cli.output import print_json
    from meshnet.lab.netns import check_lab_name
    from meshnet.lab.state import default_base_dir
    from meshnet.lab.teardown import tear_down

    _require_root()
    check_lab_name(args.name)
    removed = tear_down(
        args.name, default_base_dir(args.name), progress=None if args.json else _say
    )
    if args.json:
        print_json(
            {
                "name": args.name,
                "processes": removed.processes,
                "namespaces": removed.namespaces,
            }
        )
    elif removed.anything:
        print(
            f"lab {args.name}: {removed.processes} processes ended, "
            f"{len(removed.namespaces)} namespaces removed"
        )
    else:
        print(f"lab {args.name} is not up: nothing to do")
    return 0


def run_ls(args: argparse.Namespace) -> int:
    """Run ``meshnet lab ls``."""
    from meshnet.cli.output import print_json, print_table
    from meshnet.errors import MeshnetError
    from meshnet.lab.state import LABS_DIR
    from meshnet.lab.topology import Lab

    names = sorted(path.name for path in LABS_DIR.iterdir()) if LABS_DIR.is_dir() else []
    documents: list[dict[str, object]] = []
    rows: list[tuple[str, ...]] = []
    for name in names:
        try:
            lab = Lab.attach(name)
            documents.append(_describe(lab))
            rows.append((name, lab.etcd_url, " ".join(host.name for host in lab.hosts)))
        except MeshnetError as exc:
            print(f"lab {name}: {exc}", file=sys.stderr)
    if args.json:
        print_json(documents)
    elif rows:
        print_table(("LAB", "ETCD", "HOSTS"), rows)
    else:
        print("no lab is up: start one with 'meshnet lab up'")
    return 0


def _command(
    subparsers: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    summary: str,
    description: str,
    epilog: str,
) -> argparse.ArgumentParser:
    return subparsers.add_parser(
        name,
        help=summary,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _add_name(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--name", default="lab", help="choose the lab, by its name (default: %(default)s)"
    )


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def _require_root() -> None:
    from meshnet.errors import PolicyRefusedError

    if os.geteuid() != 0:
        raise PolicyRefusedError("a lab's processes and namespaces belong to root: use sudo")


def _read_lab(name: str, base_dir: Path) -> LabDocument:
    from meshnet.errors import NotFoundError
    from meshnet.lab.state import LabFile

    try:
        return LabFile(base_dir).read()
    except NotFoundError as exc:
        option = "" if name == "lab" else f" --name {name}"
        raise NotFoundError(
            f"lab {name!r} is not up: start it with 'meshnet lab up{option}'"
        ) from exc


def _describe(lab: Lab) -> dict[str, object]:
    return {
        "name": lab.name,
        "etcd": lab.etcd_url,
        "hosts": [
            {
                "id": host.name,
                "underlay_ip": str(host.underlay_ip),
                "netns": host.netns,
                "socket": str(host.socket_path),
                "pid": host.agent_pid if host.is_agent_running() else None,
            }
            for host in lab.hosts
        ],
    }


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
