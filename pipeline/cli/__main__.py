"""`python -m pipeline.cli`: the same as `deploy`."""

from pipeline.cli import main

main()
