"""What goes over the wire: headers, checksums, and addresses computed from addresses.

Pure: imports no socket, file, clock or trio, and nothing of meshnet but `model`.  What the
userspace VTEP uses of it (checksum, vxlan, virtio, inner, segment, coalesce, icmp) imports
only the standard library's smallest modules, because that process starts within milliseconds.
"""

from __future__ import annotations

Buffer = bytes | bytearray | memoryview
"""Bytes, whoever owns them; each function says whether it keeps a reference."""
