"""`python -m ckptconv`."""

from __future__ import annotations

import sys

from ckptconv.cli import main

if __name__ == "__main__":
    sys.exit(main())
