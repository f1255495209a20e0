"""``python -m platonic``: see :mod:`platonic.cli`."""

import sys

from platonic.cli import main

if __name__ == "__main__":
    sys.exit(main())
