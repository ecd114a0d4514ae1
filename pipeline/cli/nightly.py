"""`deploy baseline`, `deploy check` and `deploy history`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.cli.frame import (
    STATE,
    Commands,
    app,
    bar,
    everywhere,
    overrides_of,
    print_json,
    say,
    target_name,
    terminal,
    with_settings,
)
from profiles.errors import DeployError, UsageError

if TYPE_CHECKING:
    from pipeline.check import CheckResult

RUNS = Path("runs")
PROFILE = "A profile's name or a TOML file of your own."


@app.group(cls=Commands)
def baseline() -> None:
    """Pin the network that the nightly check compares with, and show what is pinned."""


@baseline.command()
@click.argument("run", type=click.Path(path_type=Path), metavar="RUN|BUNDLE|MODEL.onnx")
@click.option("--target", metavar="T", help=PROFILE)
@with_settings
@everywhere
def accept(run: Path, target: str | None, settings: tuple[str, ...], as_json: bool) -> int:
    """Make a network the baseline of a target: the file is pinned by its contents, its numbers are not."""
    from dataclasses import replace

    from pipeline.nightly import baseline as pinned
    from pipeline.nightly.records import pin_to_table
    from profiles.schema import load_profile
    from targets.base import load_target

    profile = load_profile(target_name(target), overrides_of(settings))
    pin, path = pinned.from_run(run)
    device = load_target(profile, STATE)
    pin = replace(pin, fingerprint=device.fingerprint().to_table())
    pinned.accept(STATE, profile.name, pin, path)
    if as_json:
        print_json({"profile": profile.name, "baseline": pin_to_table(pin)})
        return 0
    console = terminal(stdout=True)
    say(console, f"baseline of '{profile.name}': {pin.name}, {pin.sha256[:12]}, from {pin.source}")
    say(console, f"every night: deploy check --target {target}")
    return 0


@baseline.command(name="show")
@click.option("--target", metavar="T", help=f"{PROFILE}  [all]")
@everywhere
def show_baselines(target: str | None, as_json: bool) -> int:
    """Show the baselines of every target, or all that one ever had."""
    from pipeline.nightly import baseline as pinned
    from profiles.schema import load_profile

    names = [load_profile(target).name] if target else pinned.profiles_with_baseline(STATE)
    rows = []
    for name in names:
        pins = pinned.history(STATE, name)
        rows += [(name, pin) for pin in (pins if target else pins[-1:])]
    if as_json:
        told = [{"profile": n, "name": p.name, "sha256": p.sha256, "accepted": p.accepted, "source": p.source}
                for n, p in rows]  # fmt: skip
        print_json({"baselines": told})
        return 0
    for name, pin in rows:
        say(terminal(stdout=True), f"{name}  {pin.name}  {pin.sha256[:12]}  accepted {pin.accepted}  {pin.source}")
    if not rows:
        say(terminal(), "no baseline yet: deploy baseline accept RUN --target T")
    return 0


File = click.Path(path_type=Path, dir_okay=False)


@app.command()
@click.option("--target", metavar="T", help=PROFILE)
@click.option("--candidate", type=click.Path(path_type=Path), metavar="RUN|BUNDLE|MODEL.onnx",
              help="What to compare with the baseline.  [the newest run that met its budget]")  # fmt: skip
@click.option("--junit", type=File, help="Write a JUnit XML report there.")
@click.option("--markdown", type=File, help="Write Markdown there; GITHUB_STEP_SUMMARY gets it in any case.")
@click.option("--html", type=File, help="Write one self-contained page there.")
@with_settings
@everywhere
def check(
    target: str | None,
    candidate: Path | None,
    junit: Path | None,
    markdown: Path | None,
    html: Path | None,
    settings: tuple[str, ...],
    as_json: bool,
) -> int:
    """Judge whether a network became slower than its baseline: the nightly check.

    Exit code 0 for pass, warn and improved, 3 for fail, 4 where nothing can be said.
    """
    from pipeline.report import check as shown
    from profiles.schema import load_profile

    profile = load_profile(target_name(target), overrides_of(settings))
    try:
        result = _checked(profile, candidate, as_json)
    except DeployError as error:
        if junit is not None:
            _write(junit, shown.junit_error(profile.name, f"{error.message} {error.hint}".strip()))
        _summary(markdown, shown.markdown_error(profile.name, f"{error.message} {error.hint}".strip()))
        raise
    record = result.record
    if junit is not None:
        _write(junit, shown.to_junit([record]))
    _summary(markdown, shown.to_markdown(record))
    if html is not None:
        from pipeline.report import check_html

        _write(html, check_html.check_page(record, result.sessions))
    if as_json:
        print_json({"number": result.number, "exit_code": record.verdict.exit_code, **shown.to_json(record)})
    else:
        shown.show(record, terminal(stdout=True))
    return record.verdict.exit_code


def _checked(profile: Any, candidate: Path | None, quiet: bool) -> CheckResult:
    from pipeline.check import CheckRequest
    from pipeline.check import check as run
    from targets.base import load_target

    request = CheckRequest(profile, candidate, STATE, RUNS)
    with ExitStack() as bars:

        def progress(text: str) -> Callable[[float], None]:
            bars.pop_all().close()
            shown: Callable[[float], None] = bars.enter_context(bar(text, not quiet))
            return shown

        return run(request, load_target(profile, STATE), progress)


def _summary(path: Path | None, text: str) -> None:
    """Markdown to the file asked for, and to the summary of a GitHub Actions job where there is one."""
    import os

    if path is not None:
        _write(path, text)
    if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        try:
            with Path(summary).open("a", encoding="utf-8") as file:
                file.write(text + "\n")
        except OSError as error:
            raise DeployError(f"cannot write '{summary}': {error.strerror}.", "unset GITHUB_STEP_SUMMARY.") from None


def _write(path: Path, text: str) -> None:
    from pipeline.cache import write_atomic

    write_atomic(path, text.encode())


@app.command()
@click.option("--target", metavar="T", help=f"{PROFILE}  [all]")
@click.option("--last", type=click.IntRange(min=1), default=30, show_default=True, help="How many checks.")
@click.option("--html", type=File, help="Write a page with plots there.")
@everywhere
def history(target: str | None, last: int, html: Path | None, as_json: bool) -> int:
    """Show the checks of past nights: ratios, verdicts, and where the baseline's own times moved."""
    from pipeline.nightly.history import Nights
    from pipeline.report import history as shown
    from profiles.schema import load_profile

    name = load_profile(target).name if target else None
    place = STATE / "nights.sqlite"
    if not place.is_file():
        raise UsageError("no check was ever made here.", "deploy check --target T")
    with Nights(place) as nights:
        records = nights.numbered(name, last)
    changes = [change for record in list(records.values())[-1:] for change in record.changes]
    if html is not None:
        _write(html, shown.history_page(list(records.values()), changes))
    if as_json:
        print_json(shown.history_json(list(records.values())))
    else:
        shown.show_history(list(records.values()), terminal(stdout=True))
    return 0
