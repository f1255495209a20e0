"""``python -m weight_compression``: pack, unpack, inspect and verify files of weights."""

import sys

from weight_compression.cli import main

if __name__ == "__main__":
    sys.exit(main())
