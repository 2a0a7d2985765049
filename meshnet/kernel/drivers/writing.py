"""Two ways to write operations: packed, thousands in a few sends, and one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from meshnet.errors import KernelRefusedError, NotFoundError
from meshnet.tables import Failure, Op

if TYPE_CHECKING:
    from meshnet.kernel.drivers.namespace import HostNamespace

Encoder = Callable[[Sequence[Op], Mapping[str, int], int], list[bytes]]
"""Takes operations, indices of links and a first sequence number; returns a message for each."""


def write_packed(
    namespace: HostNamespace,
    encode: Encoder,
    ops: Sequence[Op],
    note: Callable[[Sequence[Op]], None] | None = None,
) -> list[Failure]:
    """Write operations on a table with thousands of rows.

    Args:
        note: called with the operations that are about to be sent.
    """
    failures: list[Failure] = []
    next_sequence = namespace.rtnl.next_sequence
    try:
        messages = encode(ops, namespace.indices, next_sequence)
    except KeyError:
        # A link vanished: find out which operations are without theirs, and send the rest.  Not
        # looked for beforehand, since it hardly ever happens and there are thousands.
        ops, failures = _leave_out_linkless(encode, ops, namespace.indices)
        messages = encode(ops, namespace.indices, next_sequence)
    namespace.writes += len(messages)
    if note is not None:
        note(ops)
    for i, refusal in sorted(namespace.rtnl.send_packed(messages).items()):
        failures.append(Failure(ops[i], refusal.errno, str(refusal)))
    return failures


def write_each(
    namespace: HostNamespace, write: Callable[[Op], None], ops: Sequence[Op]
) -> list[Failure]:
    """Write operations one by one.

    Args:
        write: raises the kernel's refusal; KeyError: the operation's link does not exist.
    """
    failures = []
    for op in ops:
        namespace.writes += 1
        try:
            write(op)
        except OSError as error:
            failures.append(Failure(op, error.errno or 0, str(error)))
        except (KernelRefusedError, NotFoundError) as error:
            failures.append(Failure(op, 0, str(error)))
        except KeyError as error:
            failures.append(_linkless(op, error))
    return failures


def _leave_out_linkless(
    encode: Encoder, ops: Sequence[Op], indices: Mapping[str, int]
) -> tuple[list[Op], list[Failure]]:
    good, failures = [], []
    for op in ops:
        try:
            encode([op], indices, 0)
            good.append(op)
        except KeyError as error:
            failures.append(_linkless(op, error))
    return good, failures


def _linkless(op: Op, error: KeyError) -> Failure:
    return Failure(op, 0, f"link {error.args[0]} does not exist")
