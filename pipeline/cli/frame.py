"""The frame of the command line: one group of commands, how errors and results are told, options that many share.

Results go to stdout, everything else to stderr. With `--json` stdout holds exactly one JSON object, errors included.
Everything heavy is imported inside the command that needs it, so that `deploy --help` starts at once.
"""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

import click

from profiles import plugins
from profiles.errors import DeployError, UsageError, near_miss

if TYPE_CHECKING:
    from rich.console import Console

PLUGINS = {
    "candidates": "pipeline.graph.candidates",
    "criteria": "pipeline.prune.criteria",
    "encoders": "pipeline.release.encoders",
    "hooks": "pipeline.recover.hooks",
    "passes": "pipeline.graph.passes",
    "rules": "pipeline.prune.rules",
    "runtimes": "targets.runtimes",
    "solvers": "pipeline.latency.solvers",
    "targets": "targets",
}
STATE = Path(".deploy")
SPIN = ("GOMP_SPINCOUNT", "1000")
"""How long torch's idle threads spin (libgomp reads it as torch is loaded; its own default is 300,000 turns).

They take the core from whoever the others wait for wherever something else computes too. Measuring 33 losses on two
cores: 21 s alone, 135 s beside an equal process; with this 23 s and 35 s.
"""
RUNTIMES = (
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx-cu13-libs",
    "torch",
    "onnx",
    "onnx-graphsurgeon",
)


# --- the frame --------------------------------------------------------------------------------------------------------


class Commands(click.Group):
    """A group that answers an unknown command with the nearest one."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; an unknown one is a UsageError of ours."""
        if args and self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            near = near_miss(args[0], self.list_commands(ctx))
            raise UsageError(f"no command named '{args[0]}'. {near}", "deploy --help")
        return super().resolve_command(ctx, args)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and leave with its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    os.environ.setdefault(*SPIN)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a locale without our signs costs a sign, not the result
    sys.exit(_run(given))


def _run(given: list[str]) -> int:
    try:
        return int(app.main(given, "deploy", standalone_mode=False) or 0)
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.Abort:
        return _fail(given, "interrupted.", "", 130)
    except click.UsageError as error:
        return _fail(given, *_usage(error, given), 2)
    except DeployError as error:
        return _fail(given, error.message, error.hint, error.exit_code)
    except OSError as error:
        from pipeline.cache import refused

        told = refused(error)
        if told is None:
            return _bug(given, error)
        return _fail(given, told.message, told.hint, told.exit_code)
    except Exception as error:  # noqa: BLE001 - the reader of --json gets an object of a bug too
        return _bug(given, error)


def _bug(given: Sequence[str], error: Exception) -> int:
    """The stack of what should not have happened; with `--json` an object beside it."""
    traceback.print_exception(error)
    if "--json" in given:
        told = {"error": f"{type(error).__name__}: {error}", "hint": "a bug: its stack is on stderr."}
        print_json({**told, "exit_code": 1})
    return 1


def _usage(error: click.UsageError, given: Sequence[str]) -> tuple[str, str]:
    """Message and hint of what click complains about, in the manner of our own errors."""
    hint = f"deploy {given[0]} --help" if given and given[0] in app.commands else "deploy --help"
    if isinstance(error, click.NoSuchOption) and error.ctx:
        known = [name for parameter in error.ctx.command.params for name in parameter.opts if name.startswith("--")]
        return f"no option named '{error.option_name}'. {near_miss(error.option_name, known)}", hint
    message = error.format_message().strip()
    return f"{message[:1].lower()}{message[1:].rstrip('.')}.", hint


def _fail(given: Sequence[str], message: str, hint: str, code: int) -> int:
    if "--traceback" in given:
        traceback.print_exc()
    if "--json" in given:
        print_json({"error": message, "hint": hint, "exit_code": code})
        return code
    from rich.text import Text

    console = terminal()
    console.print(Text.assemble(("Error: ", "bold red"), message), soft_wrap=True, highlight=False)
    if hint:
        say(console, hint)
    return code


def print_json(table: dict[str, Any]) -> None:
    """One JSON object on stdout."""
    try:
        sys.stdout.write(json.dumps(table, allow_nan=False) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        _unread(sys.stdout)


def terminal(*, stdout: bool = False) -> Console:
    """rich's console; off a terminal wide enough that no line of a table is cut.

    A reader that closed its end of the pipe costs it the rest of the text, and costs the command nothing.
    """
    from rich.console import Console

    class Lasting(Console):
        def on_broken_pipe(self) -> None:
            self.quiet = True
            _unread(stream)

    stream = sys.stdout if stdout else sys.stderr
    return Lasting(stderr=not stdout, width=None if stream.isatty() else 200)


def _unread(stream: TextIO) -> None:
    """Send what nobody reads any more to nowhere, the rest of the stream's buffer too."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def say(console: Console, text: str) -> None:
    """One line as it is: no markup, no wrapping, no colours of its own."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


class _Said(logging.Handler):
    """Warnings of the pipeline, one line each on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        say(terminal(), f"{record.levelname.lower()}: {record.getMessage()}")


def _say_warnings() -> None:
    for name in ("pipeline", "targets"):
        logger = logging.getLogger(name)
        if not any(isinstance(there, _Said) for there in logger.handlers):
            logger.addHandler(_Said(logging.WARNING))


def _version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        from pipeline.stage import tool_versions

        versions = tool_versions("edge-deploy", *RUNTIMES)
        own = versions.pop("edge-deploy", "(not installed)")
        click.echo("\n".join([f"edge-deploy {own}", *(f"{name} {version}" for name, version in versions.items())]))
        ctx.exit()


Command = Callable[..., int]


def everywhere(command: Command) -> Command:
    """Options of every command."""
    command = click.option("--traceback", is_flag=True, expose_value=False, help="Show an error's stack.")(command)
    return click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, and nothing else.")(command)


PROFILE = "A profile's name or a TOML file of your own."
with_target = click.option("--target", metavar="T", help=PROFILE)


def with_settings(command: Command) -> Command:
    """The option `--set KEY=VALUE`."""
    text = "Lay a key over the profile, e.g. --set prune.min_width=4. May be repeated."
    return click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help=text)(command)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version,
              help="Version of the tool and of every runtime.")  # fmt: skip
def app() -> None:
    """Prune a trained network under a latency budget that is measured on the device that ships it."""
    _say_warnings()


# --- what several commands share ---


def target_name(name: str | None) -> str:
    """The profile asked for. Raises UsageError where none was."""
    if name is None:
        from profiles.schema import profile_names

        raise UsageError("--target is missing.", f"--target {'|'.join(profile_names())}, or a TOML file of your own.")
    return name


def exists(kind: str, name: str) -> None:
    """Raise UsageError with the near miss where no plug-in has this name; nothing is imported."""
    if name not in plugins.names(PLUGINS[kind]):
        plugins.load(PLUGINS[kind], name)


def overrides_of(settings: Sequence[str]) -> dict[str, Any]:
    """Nested tables from `prune.min_width=4`; a value that is no TOML is taken as a string."""
    import tomllib

    tables: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not all(part.replace("-", "_").isidentifier() for part in key.split(".")):
            raise UsageError(f"--set {setting} is not KEY=VALUE.", "--set prune.min_width=4")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        *path, last = key.split(".")
        table = tables
        for part in path:
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                message = f"--set {setting} goes below '{part}', which another --set made a value."
                raise UsageError(message, "set one of them.")
        table[last] = value
    return tables


# --- files that are written at the end ---

FILE = click.Path(path_type=Path, dir_okay=False)
"""Type of an option that names a file to write."""
Content = Callable[[], str]


def writable(*paths: Path | None, parents: bool = True) -> None:
    """Make sure of places for files before any work is done for them; parents: folders that are missing are made.

    Raises UsageError for a place that cannot be used.
    """
    import tempfile

    for path in paths:
        if path is None:
            continue
        hint = "name a file in a folder that can be written."
        if path.exists() and not path.is_file():
            raise UsageError(f"'{path}' is there and is not a plain file.", hint)
        try:
            if parents:
                path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path.parent):
                pass
        except OSError as error:
            raise UsageError(f"cannot write '{path}': {error.strerror}.", hint) from None


def cleared(*paths: Path | None) -> None:
    """Remove what an earlier command left in places that are `writable`, so that it is never taken for this one's.

    Raises UsageError for a file that cannot be removed.
    """
    for path in paths:
        try:
            if path is not None:
                path.unlink(missing_ok=True)
        except OSError as error:
            hint = "name a file in a folder that can be written."
            raise UsageError(f"cannot replace '{path}': {error.strerror}.", hint) from None


def write(files: Sequence[tuple[Path | None, Content]], *, append: bool = False) -> list[DeployError]:
    """Write each file that has a path; what could not be written comes back, so that it hides no result."""
    problems = []
    for path, text in files:
        if path is None:
            continue
        try:
            _put(path, text(), append)
        except DeployError as error:
            problems.append(error)
        except OSError as error:
            problems.append(DeployError(f"cannot write '{path}': {error.strerror}.", "make its folder writable."))
    return problems


def _put(path: Path, text: str, append: bool) -> None:
    from pipeline.cache import write_atomic

    if append:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    else:
        write_atomic(path, text.encode())


def finished(code: int, problems: Sequence[DeployError], told: dict[str, Any] | None = None) -> int:
    """The exit code of a result that was shown: its own, or that of the first problem in keeping it, which is told.

    told: the result where it has to be the one JSON object; the problem is then a part of it.
    """
    first = problems[0] if problems else None
    if told is None:
        if first is not None:
            for more in problems[1:]:
                say(terminal(), f"warning: {more.message}")
            raise first
        return code
    if first is not None:
        code = first.exit_code
        told = {**told, "exit_code": code, "error": " ".join(p.message for p in problems), "hint": first.hint}
    print_json(told)
    return code


def bar(text: str, wanted: bool) -> Any:
    """A progress bar on stderr that takes the done share of the work, 0 to 1."""
    from contextlib import contextmanager

    from rich.progress import Progress

    @contextmanager
    def shown() -> Any:
        console = terminal()
        with Progress(console=console, transient=True, disable=not (wanted and console.is_terminal)) as bar:
            task = bar.add_task(text, total=1.0)
            yield lambda share: bar.update(task, completed=share)

    return shown()
