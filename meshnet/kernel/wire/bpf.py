"""Classic BPF programs on sockets: the kernel drops unwanted messages before it wakes anybody.

linux/filter.h, linux/bpf_common.h.
"""

from __future__ import annotations

import ctypes
import socket
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

LOAD_U32, LOAD_U16, LOAD_U8 = 0x20, 0x28, 0x30
IF_EQUAL, IF_BITS, RETURN = 0x15, 0x45, 0x06
EVERYTHING = 0xFFFF_FFFF
"""Operand of RETURN: how many bytes of the packet to keep; 0 drops it."""

Step = tuple[int, int, int, int]
"""Code, steps to skip if true, if false, operand."""

_SO_ATTACH_FILTER = 26
_SOCK_FILTER = struct.Struct("=HBBI")
_SOCK_FPROG = struct.Struct("@HP")


def attach_filter(target: socket.socket, program: Sequence[Step]) -> None:
    """Let a socket receive only what a program keeps.  Loads are big-endian.

    Raises:
        OSError: the kernel refuses the program.
    """
    # The kernel copies the program: `code` need only live until setsockopt(2) returns.
    code = ctypes.create_string_buffer(b"".join(_SOCK_FILTER.pack(*step) for step in program))
    fprog = _SOCK_FPROG.pack(len(program), ctypes.addressof(code))
    target.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, fprog)
