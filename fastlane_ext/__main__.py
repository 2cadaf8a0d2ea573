"""``python -m fastlane_ext``: the same as the ``fastlane`` command."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
