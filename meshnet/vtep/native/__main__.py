"""``python -m meshnet.vtep.native``: build the native engine."""

import sys

from meshnet.errors import MeshnetError
from meshnet.vtep.native.library import build

try:
    print(build())
except MeshnetError as error:
    print(f"meshnet.vtep.native: {error}", file=sys.stderr)
    sys.exit(error.exit_status)
