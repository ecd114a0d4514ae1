"""Starts the agent, from its folder or from the zip that was pushed to a board."""

import sys

from board.commands import main  # type: ignore[import-not-found]

sys.exit(main(sys.argv[1:]))
