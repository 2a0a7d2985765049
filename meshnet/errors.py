"""The errors of meshnet, and what each tells a caller.

Every error a user can meet is a `MeshnetError`.  Its class fixes the exit status of the command
line (docs/cli.md) and says whether trying again may help; its message is one line that names the
object, the value and the remedy.  Edges translate foreign exceptions with ``raise … from``.

Pure: imports nothing of meshnet and no I/O.
"""

from __future__ import annotations

# typing.TYPE_CHECKING without importing typing: the client has to start fast.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import ClassVar


class MeshnetError(Exception):
    """Base of all errors of meshnet.

    Attributes:
        exit_status: exit status of a command that ends with this error.
        retryable: whether the same request may succeed later without the caller changing it.
    """

    exit_status: ClassVar[int] = 1
    retryable: ClassVar[bool] = False


class UsageError(MeshnetError):
    """An argument, option, config key or request field is malformed or out of range."""

    exit_status = 2


class AgentUnreachableError(MeshnetError):
    """Nothing answers on the agent's socket."""

    exit_status = 3
    retryable = True


class NotFoundError(MeshnetError):
    """The network, process, endpoint or host that was named does not exist."""

    exit_status = 4


class ConflictError(MeshnetError):
    """The object exists already, is taken, or is still in use."""

    exit_status = 5


class PoolExhaustedError(MeshnetError):
    """No free subnet or address is left in the pool."""

    exit_status = 6


class KernelRefusedError(MeshnetError):
    """The kernel refused an operation or lacks a feature."""

    exit_status = 7


class StoreUnavailableError(MeshnetError):
    """etcd cannot be reached, did not answer in time, or has no leader."""

    exit_status = 8
    retryable = True


class PolicyRefusedError(MeshnetError):
    """The request is well-formed but not allowed (policy, credentials, host namespace)."""

    exit_status = 9


def error_classes() -> dict[str, type[MeshnetError]]:
    """Every concrete error class by name: turns the API's error documents back into errors."""
    return {cls.__name__: cls for cls in MeshnetError.__subclasses__()}
