"""``python -m meshnet_agent``."""

import sys

from meshnet_agent.main import main

sys.exit(main())
