"""Who a container's process is: ``USER[:GROUP]`` looked up in its own /etc/passwd and /etc/group.

Pure: the caller brings the files' texts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from meshnet.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_MAX_ID = (1 << 31) - 1


@dataclass(frozen=True, slots=True)
class User:
    """Ids and home of a process's user."""

    uid: int = 0
    gid: int = 0
    groups: tuple[int, ...] = ()
    home: str = "/"


def resolve_user(text: str, passwd: str, group: str) -> User:
    """Look a user up, by name or number; a number need not be in the files.

    Raises:
        UsageError: a name that is not in the files, or a number out of range.
    """
    name, _, group_name = text.partition(":")
    name = name or "0"
    uid, gid, home, login = _number(name), 0, "/", None
    for entry in _entries(passwd, 7):
        if entry[0] == name or (uid is not None and entry[2] == str(uid)):
            login, home = entry[0], entry[5] or "/"
            uid, gid = _number(entry[2]), _number(entry[3]) or 0
            break
    if uid is None:
        raise UsageError(f"user {name!r} is not in the container's /etc/passwd: give a number")
    if group_name:
        return User(uid, _group_id(group_name, group), (), home)
    groups = [
        number
        for entry in _entries(group, 4)
        if login in entry[3].split(",") and (number := _number(entry[2])) is not None
    ]
    return User(uid, gid, tuple(g for g in groups if g != gid), home)


def add_groups(user: User, names: Sequence[str], group: str) -> User:
    """The user in further groups, by name or number.

    Raises:
        UsageError: a name that is not in the file, or a number out of range.
    """
    added = (*user.groups, *(_group_id(name, group) for name in names))
    return replace(user, groups=tuple(dict.fromkeys(added)))


def _group_id(name: str, group: str) -> int:
    number = _number(name)
    if number is not None:
        return number
    for entry in _entries(group, 4):
        if entry[0] == name and (found := _number(entry[2])) is not None:
            return found
    raise UsageError(f"group {name!r} is not in the container's /etc/group: give a number")


def _number(text: str) -> int | None:
    if not (text.isascii() and text.isdigit()):
        return None
    if int(text) > _MAX_ID:
        raise UsageError(f"id {text} is out of range: 0 to {_MAX_ID}")
    return int(text)


def _entries(text: str, fields: int) -> Iterator[list[str]]:
    for line in text.splitlines():
        entry = line.strip().split(":")
        if len(entry) >= fields:
            yield entry
