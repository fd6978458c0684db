"""`python -m trellax`: the command `trellax`, where it is not on the PATH."""

import sys

from .commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
