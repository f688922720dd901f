"""`python -m fewstep` is the command `fewstep`."""

import sys

from fewstep.cli import main

sys.exit(main())
