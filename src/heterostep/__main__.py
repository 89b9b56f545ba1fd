"""`python -m heterostep`."""

import sys

from heterostep.cli import main

sys.exit(main())
