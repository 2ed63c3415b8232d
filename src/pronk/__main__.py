"""`python -m pronk`: the command line."""

import sys

from pronk.cli.app import main

sys.exit(main())
