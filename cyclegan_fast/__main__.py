"""``python -m cyclegan_fast`` is the command ``cyclegan-fast``."""

import sys

from cyclegan_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
