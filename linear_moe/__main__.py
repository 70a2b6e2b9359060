"""`python -m linear_moe`: the `linear-moe` command."""

import sys

from linear_moe.cli import main

if __name__ == "__main__":
    sys.exit(main())
