"""`python -m tarflow_fast` is the command line tool `tarflow-fast`."""

import sys

from tarflow_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
