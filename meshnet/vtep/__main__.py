"""``python -m meshnet.vtep``."""

import sys

from meshnet.vtep.main import main

sys.exit(main())
