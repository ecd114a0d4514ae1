"""The command line: `deploy build`, measure, show, verify, list, doctor and gc. The only file that knows click.

Results go to stdout, everything else to stderr. With `--json` stdout holds exactly one JSON object, errors included.
Everything heavy is imported inside the command that needs it, so that `deploy --help` starts at once.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from profiles import plugins
from profiles.errors import DeployError, UsageError, near_miss

if TYPE_CHECKING:
    from rich.console import Console

    from pipeline.run import BuildRequest

PLUGINS = {
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
RUNTIMES = ("onnxruntime", "onnxruntime-gpu", "tensorrt", "torch", "onnx", "onnx-graphsurgeon")


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
        from pipeline.cache import disk_full

        full = disk_full(error, Path(str(error.filename or ".")))
        if full is None:
            raise
        return _fail(given, full.message, full.hint, full.exit_code)


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
        _print_json({"error": message, "hint": hint, "exit_code": code})
        return code
    from rich.text import Text

    console = _console()
    console.print(Text.assemble(("Error: ", "bold red"), message), soft_wrap=True, highlight=False)
    if hint:
        _say(console, hint)
    return code


def _print_json(table: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(table, allow_nan=False) + "\n")
    sys.stdout.flush()


def _console(*, stdout: bool = False) -> Console:
    """rich's console; off a terminal wide enough that no line of a table is cut."""
    from rich.console import Console

    stream = sys.stdout if stdout else sys.stderr
    return Console(stderr=not stdout, width=None if stream.isatty() else 200)


def _say(console: Console, text: str) -> None:
    """One line as it is: no markup, no wrapping, no colours of its own."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


class _Said(logging.Handler):
    """Warnings of the pipeline, one line each on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        _say(_console(), f"{record.levelname.lower()}: {record.getMessage()}")


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


def _everywhere(command: Command) -> Command:
    """Options of every command."""
    command = click.option("--traceback", is_flag=True, expose_value=False, help="Show an error's stack.")(command)
    return click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, and nothing else.")(command)


def _settings(command: Command) -> Command:
    text = "Lay a key over the profile, e.g. --set prune.min_width=4. May be repeated."
    return click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help=text)(command)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version,
              help="Version of the tool and of every runtime.")  # fmt: skip
def app() -> None:
    """Prune a trained network under a latency budget that is measured on the device that ships it."""
    _say_warnings()


# --- build ------------------------------------------------------------------------------------------------------------


@app.command()
@click.option("--target", metavar="T", help="A profile's name (deploy list profiles) or a TOML file of your own.")
@click.option("--project", type=click.Path(path_type=Path), default=Path(), help="Folder with deploy.toml.  [here]")
@click.option("--budget", metavar="8ms|0.5x", help="Latency to keep: absolute, or a share of the dense network's.")
@click.option("--criterion", metavar="C", help="What orders the channels of a group (deploy list criteria).")
@click.option("--solver", metavar="S", help="What chooses the widths (deploy list solvers).")
@click.option("--repair", metavar="R", help="none, bn or least-squares.")
@click.option("--rounds", type=int, metavar="N", help="Most turns of predict, measure, correct.")
@_settings
@click.option("--out", type=click.Path(path_type=Path), metavar="RUN", help="Folder of the run.  [runs/DATE-TARGET]")
@click.option("--resume", is_flag=True, help="Go on with the latest unfinished run, or with the one that --out names.")
@click.option("--dry-run", is_flag=True, help="Groups, table and solved plan; no training, no bundle.")
@_everywhere
def build(as_json: bool, resume: bool, out: Path | None, **options: Any) -> int:
    """Prune a project's network to a latency budget and write the release bundle."""
    from pipeline.run import BuildRequest, latest_unfinished

    if resume:
        asked = [name for name, value in options.items() if value and value != Path()]
        if asked:
            name = asked[0].replace("settings", "set").replace("_", "-")
            message = f"--resume goes on with what was asked before, and takes no --{name}."
            raise UsageError(message, "deploy build --resume, or --resume --out RUN")
        request = BuildRequest.again(out or latest_unfinished(Path()), _console())
    else:
        request = _request(out, **options)
    from pipeline import flow

    result = flow.build(request)
    from pipeline.report import text

    if as_json:
        _print_json(dict(result.summary))
    elif result.report is not None:
        text.show(result.report, _console(stdout=True))
    elif result.summary.get("dry_run"):
        text.show_dry(result.summary, _console(stdout=True))
    return int(result.exit_code)


def _request(
    out: Path | None, target: str | None, project: Path, budget: str | None, settings: tuple[str, ...], dry_run: bool,
    criterion: str | None, solver: str | None, repair: str | None, rounds: int | None,
) -> BuildRequest:  # fmt: skip
    """A checked `BuildRequest`: every name in it exists, before anything heavy is imported."""
    from pipeline.run import BuildRequest
    from profiles.schema import Budget, load_profile

    overrides = _overrides(settings)
    chosen = {"criterion": criterion, "solver": solver, "repair": repair, "rounds": rounds}
    overrides.setdefault("prune", {}).update({name: value for name, value in chosen.items() if value is not None})
    overrides = {name: table for name, table in overrides.items() if table != {}}
    if budget is not None:
        Budget.parse(budget)
    profile = load_profile(_target(target), overrides)
    _exists("criteria", profile.prune.criterion)
    _exists("solvers", profile.prune.solver)
    _exists("targets", profile.target)
    if budget is None and profile.budget is None:
        raise UsageError(f"there is no budget: profile '{profile.name}' has none.", "--budget 0.5x, or --budget 8ms.")
    if not (project / "deploy.toml").is_file():
        raise UsageError(f"there is no project file '{project / 'deploy.toml'}'.", "deploy build --project DIR")
    return BuildRequest(project, _target(target), budget, overrides, out, False, dry_run, Path(), _console())


def _target(name: str | None) -> str:
    if name is None:
        from profiles.schema import profile_names

        raise UsageError("--target is missing.", f"--target {'|'.join(profile_names())}, or a TOML file of your own.")
    return name


def _exists(kind: str, name: str) -> None:
    """Raise UsageError with the near miss where no plug-in has this name; nothing is imported."""
    if name not in plugins.names(PLUGINS[kind]):
        plugins.load(PLUGINS[kind], name)


def _overrides(settings: Sequence[str]) -> dict[str, Any]:
    """Nested tables from `prune.min_width=4`; a value that is no TOML is taken as a string."""
    import tomllib

    tables: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not all(part.isidentifier() for part in key.split(".")):
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


# --- measure, verify --------------------------------------------------------------------------------------------------


@app.command()
@click.argument("models", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="MODEL.onnx...")
@click.option("--target", metavar="T", help="A profile's name or a TOML file of your own.")
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="Write every raw sample there, as JSON.")
@_settings
@_everywhere
def measure(
    models: tuple[Path, ...], target: str | None, out: Path | None, settings: tuple[str, ...], as_json: bool
) -> int:
    """Measure ONNX files on a target, interleaved in one session; ratios are to the first one."""
    import tempfile

    from pipeline.cache import write_atomic
    from pipeline.report import session as shown
    from profiles.schema import load_profile
    from targets.base import load_target

    for model in models:
        if not model.is_file():
            raise UsageError(f"there is no file '{model}'.", "deploy measure MODEL.onnx")
    profile = load_profile(_target(target), _overrides(settings))
    device = load_target(profile, STATE)
    names = _names(models)
    with tempfile.TemporaryDirectory() as work, _bar("measure", not as_json) as progress:
        built = {name: device.build(model, Path(work) / f"{name}.artifact") for name, model in names.items()}
        session = device.measure(built, profile.measure, "accept", progress)
    if out is not None:
        write_atomic(out, session.to_json().encode() + b"\n")
    for condition in session.preflight.spoilt:
        _say(_console(), f"note: {condition.name} is {condition.value}; {condition.why}.")
    if as_json:
        _print_json(shown.session_json(session))
    else:
        _console(stdout=True).print(shown.session_table(session), highlight=False)
    if session.contaminated:
        _say(_console(), "note: the session is contaminated: more than 20 % of a network's blocks were disturbed.")
    return 4 if session.contaminated else 0


def _names(models: Sequence[Path]) -> dict[str, Path]:
    """A short name for every file: its stem, with a number where two are alike."""
    names: dict[str, Path] = {}
    for model in models:
        name, count = model.stem, 2
        while name in names:
            name, count = f"{model.stem}-{count}", count + 1
        names[name] = model
    return names


def _bar(text: str, wanted: bool) -> Any:
    """A progress bar on stderr that takes the done share of the work, 0 to 1."""
    from contextlib import contextmanager

    from rich.progress import Progress

    @contextmanager
    def shown() -> Any:
        console = _console()
        with Progress(console=console, transient=True, disable=not (wanted and console.is_terminal)) as bar:
            task = bar.add_task(text, total=1.0)
            yield lambda share: bar.update(task, completed=share)

    return shown()


@app.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--target", metavar="T", help="Measure both networks again there, and judge the budget anew.")
@_settings
@_everywhere
def verify(bundle: Path, target: str | None, settings: tuple[str, ...], as_json: bool) -> int:
    """Check a bundle: checksums, schema, graphs, the sample's output, and with --target its latency."""
    import tempfile

    from pipeline.release import verify as check
    from profiles.schema import load_profile
    from targets.base import load_target

    problems = check.verify(bundle, load_target(load_profile("local"), STATE).infer)
    told: dict[str, Any] = {"bundle": str(bundle), "problems": problems}
    code = 1 if problems else 0
    if target is not None and not problems:
        device = load_target(load_profile(target, _overrides(settings)), STATE)
        with tempfile.TemporaryDirectory() as work:
            judged, _ = check.measure_again(bundle, device, Path(work))
        told |= {"verdict": judged.verdict, "reason": judged.reason}
        code = {"met": 0, "missed": 3, "undecided": 4}[judged.verdict]
    told["exit_code"] = code
    if as_json:
        _print_json(told)
        return code
    console = _console(stdout=True)
    for problem in problems:
        _say(console, problem)
    if not problems:
        _say(console, f"{bundle} is whole: checksums, schema, graphs and the sample's output agree.")
    if "verdict" in told:
        _say(console, f"{told['verdict']}: {told['reason']}")
    return code


# --- looking ----------------------------------------------------------------------------------------------------------


@app.command()
@click.argument("run", type=click.Path(path_type=Path))
@_everywhere
def show(run: Path, as_json: bool) -> int:
    """Show a run: its closing table, or how far it came and how to go on."""
    from pipeline.report import text
    from pipeline.report.data import ReportData
    from pipeline.run import OPEN, read_state

    state = read_state(run)
    if as_json:
        told = {"run": str(run), "status": state["status"], "stages": state["stages"], "summary": state.get("summary")}
        _print_json(told)
        return 0
    console = _console(stdout=True)
    _say(console, f"{run}: {state['status']}, {state.get('seconds', 0.0):.1f} s")
    if state["stages"]:
        console.print(text.stages_table(state["stages"]), highlight=False)
    if (run / "report.json").is_file():
        console.print()
        try:
            text.show(ReportData.from_json((run / "report.json").read_text(encoding="utf-8")), console)
        except ValueError as error:
            raise DeployError(f"'{run / 'report.json'}' is {error}.", "deploy build makes it anew.") from None
    if state["status"] in OPEN:
        _say(console, f"go on with it: deploy build --resume --out {run}")
    return 0


@app.command(name="list")
@click.argument("kind", metavar="KIND")
@_everywhere
def list_(kind: str, as_json: bool) -> int:
    """List what there is of a kind: targets, profiles, criteria, solvers, passes, runtimes, hooks, encoders, rules."""
    kinds = sorted([*PLUGINS, "profiles"])
    if kind not in kinds:
        raise UsageError(f"no kind named '{kind}'. {near_miss(kind, kinds)}", f"deploy list {'|'.join(kinds)}")
    rows = _profiles() if kind == "profiles" else _plugins(PLUGINS[kind])
    if as_json:
        _print_json({kind: dict(rows)})
        return 0
    from pipeline.report import text

    _console(stdout=True).print(text.listing(rows), highlight=False)
    return 0


def _plugins(package: str) -> list[tuple[str, str]]:
    return [(name, plugins.summary(package, name)) for name in plugins.names(package)]


def _profiles() -> list[tuple[str, str]]:
    import profiles
    from profiles.schema import profile_names

    folder = Path(next(iter(profiles.__path__)))
    rows = []
    for name in profile_names():
        first = (folder / f"{name}.toml").read_text(encoding="utf-8").split("\n", 1)[0]
        rows.append((name, first.removeprefix("#").strip() if first.startswith("#") else ""))
    return rows


@app.command()
@click.option("--target", metavar="T", help="A profile's name or a TOML file of your own.")
@_settings
@_everywhere
def doctor(target: str | None, settings: tuple[str, ...], as_json: bool) -> int:
    """Look at a target: what is missing, and what would spoil a measurement there now."""
    from pipeline.report import session as shown
    from profiles.schema import load_profile
    from targets.base import load_target

    conditions = load_target(load_profile(_target(target), _overrides(settings)), STATE).doctor()
    code = 4 if any(condition.fatal and not condition.ok for condition in conditions) else 0
    if as_json:
        _print_json({"conditions": [vars(condition) for condition in conditions], "exit_code": code})
        return code
    _console(stdout=True).print(shown.conditions_table(conditions), highlight=False)
    return code


@app.command()
@click.option("--keep-days", type=click.FloatRange(min=0), default=30.0, show_default=True,
              help="Keep what was used in these days.")  # fmt: skip
@_everywhere
def gc(keep_days: float, as_json: bool) -> int:
    """Remove cached results that are old and that no run refers to."""
    from pipeline.cache import Cache

    swept = Cache(STATE).gc(keep_days)
    if as_json:
        _print_json({"objects": swept.objects, "keys": swept.keys, "bytes": swept.bytes})
    else:
        freed = f"{swept.bytes / (1 << 20):.1f} MiB freed"
        _say(_console(stdout=True), f"{swept.objects} objects and {swept.keys} stage records removed, {freed}.")
    return 0


if __name__ == "__main__":
    main()
