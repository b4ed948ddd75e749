"""`python -m clada_export.cli COMMAND ...` is `clada COMMAND ...`."""

import sys

from clada_export.cli import main

if __name__ == "__main__":
    sys.exit(main())
