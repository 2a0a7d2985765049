"""``python -m meshnet.kernel.takeover``."""

import sys

from meshnet.kernel.takeover.main import main

sys.exit(main())
