"""The command line. The only folder that knows click; a file for each family of commands, which register themselves."""

from pipeline.cli import build, groups, looking, measuring, nightly
from pipeline.cli.frame import PLUGINS, app, main

__all__ = ["PLUGINS", "app", "build", "groups", "looking", "main", "measuring", "nightly"]
