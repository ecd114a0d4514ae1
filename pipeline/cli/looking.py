"""`deploy show`, `deploy list`, `deploy doctor` and `deploy gc`."""

from __future__ import annotations

import math
import shlex
from pathlib import Path

import click

from pipeline.cli.frame import (
    PLUGINS,
    STATE,
    app,
    everywhere,
    overrides_of,
    print_json,
    say,
    target_name,
    terminal,
    with_settings,
    with_target,
)
from profiles import plugins
from profiles.errors import DeployError, UsageError, near_miss


@app.command()
@click.argument("run", type=click.Path(path_type=Path))
@everywhere
def show(run: Path, as_json: bool) -> int:
    """Show a run: its closing table, or how far it came and how to go on."""
    from pipeline.report import text
    from pipeline.report.data import ReportData
    from pipeline.run import OPEN, read_state

    state = read_state(run)
    if as_json:
        told = {"run": str(run), "status": state["status"], "stages": state["stages"], "summary": state.get("summary")}
        print_json(told)
        return 0
    console = terminal(stdout=True)
    say(console, f"{run}: {state['status']}, {state.get('seconds', 0.0):.1f} s")
    if state["stages"]:
        console.print(text.stages_table(state["stages"]), highlight=False)
    if (run / "report.json").is_file():
        console.print()
        try:
            text.show(ReportData.from_json((run / "report.json").read_text(encoding="utf-8")), console)
        except ValueError as error:
            raise DeployError(f"'{run / 'report.json'}' is {error}.", "deploy build makes it anew.") from None
    elif (state.get("summary") or {}).get("dry_run"):
        console.print()
        text.show_dry(state["summary"], console)
    if state["status"] in OPEN:
        say(console, f"go on with it: deploy build --resume --out {shlex.quote(str(run))}")
    return 0


@app.command(name="list")
@click.argument("kind", metavar="KIND")
@everywhere
def list_(kind: str, as_json: bool) -> int:
    """List what there is of a kind.

    Kinds: targets, profiles, criteria, solvers, passes, candidates, runtimes, hooks, encoders, rules; keys: what a
    profile or --set may say, with its defaults.
    """
    listings = {"profiles": _profiles, "keys": _keys}
    kinds = sorted([*PLUGINS, *listings])
    if kind not in kinds:
        raise UsageError(f"no kind named '{kind}'. {near_miss(kind, kinds)}", f"deploy list {'|'.join(kinds)}")
    rows = listings[kind]() if kind in listings else _plugins(PLUGINS[kind])
    if as_json:
        print_json({kind: dict(rows)})
        return 0
    from pipeline.report import text

    terminal(stdout=True).print(text.listing(rows), highlight=False)
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


def _keys() -> list[tuple[str, str]]:
    from profiles.schema import Profile, keys

    return list(keys(Profile))


@app.command()
@with_target
@with_settings
@everywhere
def doctor(target: str | None, settings: tuple[str, ...], as_json: bool) -> int:
    """Look at a target: what is missing, and what would spoil a measurement there now."""
    from pipeline.report import session as shown
    from profiles.schema import load_profile
    from targets.base import load_target

    conditions = load_target(load_profile(target_name(target), overrides_of(settings)), STATE).doctor()
    code = 4 if any(condition.fatal and not condition.ok for condition in conditions) else 0
    if as_json:
        print_json({"conditions": [vars(condition) for condition in conditions], "exit_code": code})
        return code
    terminal(stdout=True).print(shown.conditions_table(conditions), highlight=False)
    return code


@app.command()
@click.option("--keep-days", type=click.FloatRange(min=0), default=30.0, show_default=True,
              help="Keep what was used in these days.")  # fmt: skip
@everywhere
def gc(keep_days: float, as_json: bool) -> int:
    """Remove cached results that are old and that no run refers to."""
    from pipeline.cache import Cache

    if math.isnan(keep_days):
        raise UsageError("--keep-days nan is no number of days.", "deploy gc --keep-days 30")
    swept = Cache(STATE).gc(keep_days)
    if as_json:
        print_json({"objects": swept.objects, "keys": swept.keys, "bytes": swept.bytes})
    else:
        freed = f"{swept.bytes / (1 << 20):.1f} MiB freed"
        say(terminal(stdout=True), f"{swept.objects} objects and {swept.keys} stage records removed, {freed}.")
    return 0
