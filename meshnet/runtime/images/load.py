"""``python -m meshnet.runtime.images.load``: takes an image archive into the store.

A process of its own: unpacking keeps Python busy for seconds to minutes, and the agent answers
within milliseconds meanwhile.  It gives way to whatever else wants the CPU.  Killing it is
safe: what it leaves is collected later.
Prints one JSON document: ``{"ids": […]}``, or ``{"error": {"kind", "message"}}``.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from pathlib import Path

from meshnet.errors import MeshnetError
from meshnet.runtime.images.store import ImageStore
from meshnet.runtime.images.tarstream import Budget
from meshnet.text import printable

_NICE = 10
_MOST_SHOWN = 2000
"""Characters of an error's message."""


def main() -> int:
    """Load; returns the exit status, 0 also for an error that is told in the document."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--max-bytes", type=int, required=True)
    parser.add_argument("--max-entries", type=int, required=True)
    parser.add_argument("--name")
    args = parser.parse_args()
    os.nice(_NICE)
    # Cancelled: what was written is cleaned up on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    budget = Budget(args.max_bytes, args.max_entries)
    document: dict[str, object]
    try:
        with open(sys.stdin.fileno(), "rb", closefd=False) as archive:
            images = ImageStore(args.store).load(archive, args.name, budget)
        document = {"ids": [image.id for image in images]}
    except MeshnetError as error:
        document = {
            "error": {"kind": _kind_of(error), "message": printable(str(error), _MOST_SHOWN)}
        }
    json.dump(document, sys.stdout)
    return 0


def _kind_of(error: MeshnetError) -> str:
    """The class of the error that callers know: `meshnet.errors.error_classes`."""
    return next(c.__name__ for c in type(error).__mro__ if MeshnetError in c.__bases__)


if __name__ == "__main__":
    sys.exit(main())
