"""The environment of a shell in which neither pytest nor make runs, for the processes that tests start."""

import os

# pytest-xdist's variables would tell a bench that it runs beside other tests and must not measure. make's variables
# would tell a make below it to print the directories it enters and leaves.
OUTSIDE = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "MAKE", "MFLAGS"))}
