"""`deploy baseline`, `deploy check` and `deploy history`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.cli.frame import (
    FILE,
    PROFILE,
    STATE,
    Commands,
    Content,
    app,
    bar,
    cleared,
    everywhere,
    finished,
    overrides_of,
    print_json,
    say,
    target_name,
    terminal,
    with_settings,
    with_target,
    writable,
    write,
)
from profiles.errors import DeployError, UsageError

if TYPE_CHECKING:
    from pipeline.check import CheckResult
    from pipeline.nouns import Pin

RUNS = Path("runs")


@app.group(cls=Commands)
def baseline() -> None:
    """Pin the network that the nightly check compares with, and show what is pinned.

    Each target has one baseline, by the name of its profile. deploy gc never removes one.
    """


@baseline.command()
@click.argument("run", type=click.Path(path_type=Path), metavar="RUN|BUNDLE|MODEL.onnx")
@with_target
@with_settings
@everywhere
def accept(run: Path, target: str | None, settings: tuple[str, ...], as_json: bool) -> int:
    """Make a network the baseline of a target.

    The file is pinned by its contents, its numbers are not; earlier baselines are kept. RUN or BUNDLE must have met its
    budget and be whole; a MODEL.onnx is taken as it is. The device is recorded, and deploy check refuses another one.
    """
    from dataclasses import replace

    from pipeline.nightly import baseline as pinned
    from pipeline.nightly.records import pin_to_table
    from profiles.schema import load_profile
    from targets.base import load_target

    name = target_name(target)
    profile = load_profile(name, overrides_of(settings))
    pin, path = pinned.from_run(run)
    device = load_target(profile, STATE)
    device.require_latency()
    pin = replace(pin, fingerprint=device.fingerprint().to_table(), profile=pinned.profile_file(name))
    earlier = pinned.baseline_of(STATE, profile.name)
    if earlier is not None and earlier.profile and pin.profile and earlier.profile != pin.profile:
        say(terminal(), f"note: it takes the place of one accepted with another file, '{earlier.profile}'.")
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
        print_json({"baselines": [{"profile": n, **_shown(pin)} for n, pin in rows]})
        return 0
    for name, pin in rows:
        say(terminal(stdout=True), f"{name}  {pin.name}  {pin.sha256[:12]}  accepted {pin.accepted}  {pin.source}")
    if not rows:
        say(terminal(), f"no baseline yet: deploy baseline accept RUN --target {target or 'T'}")
    return 0


def _shown(pin: Pin) -> dict[str, Any]:
    """file: the profile's own TOML file, None for a profile that ships."""
    told = {"name": pin.name, "sha256": pin.sha256, "accepted": pin.accepted, "source": pin.source}
    return {**told, "file": pin.profile or None}


@app.command()
@with_target
@click.option("--candidate", type=click.Path(path_type=Path), metavar="RUN|BUNDLE|MODEL.onnx",
              help="What to compare with the baseline.  [the newest run in runs/ that met its budget, of its project, "
              "that ended after it was accepted; else the baseline itself]")  # fmt: skip
@click.option("--junit", type=FILE, help="Write a JUnit XML report there.")
@click.option("--markdown", type=FILE, help="Write Markdown there; GITHUB_STEP_SUMMARY gets it in any case.")
@click.option("--html", type=FILE, help="Write one self-contained page there.")
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

    The baseline, the same file again and the candidate are measured in turn, in one stage or two; an absolute budget of
    the profile, else of the candidate, else of the baseline is judged too. Without a newer run the baseline is compared
    with itself, a check of the environment, and the verdict says so. Every check is kept, what broke off included:
    deploy history.

    Exit code 0 for pass, warn and improved; 3 for fail; 4 for undecided and inconclusive, and where nothing could be
    measured: no baseline, another device, a network of other shapes; 1 where a step failed, or where the verdict stands
    but could not be kept or a report not written; 2 for a mistake in what was asked; 130 for an interruption.
    """
    from pipeline.report import check as shown
    from profiles.schema import load_profile

    named = target or "no target"
    places = Places(junit, markdown, html, _summary())
    writable(junit, markdown, html)
    writable(places.summary, parents=False)
    cleared(junit, markdown, html)
    try:
        profile = load_profile(target_name(target), overrides_of(settings))
        named = profile.name
        result = _checked(profile, target_name(target), candidate, places.folders, as_json)
    except Exception as error:
        for problem in _not_measured(named, _told(error), places):
            say(terminal(), f"warning: {problem.message}")
        raise
    problems = [*([result.error] if result.error else []), *_reports(result, places)]
    if not as_json:
        shown.show(result.record, terminal(stdout=True))
    code = result.exit_code
    told = {"number": result.number, **shown.to_json(result.record), "exit_code": code}
    return finished(code, problems, told if as_json else None)


def _checked(profile: Any, target: str, candidate: Path | None, spare: tuple[Path, ...], quiet: bool) -> CheckResult:
    from pipeline.check import CheckRequest
    from pipeline.check import check as run
    from targets.base import load_target

    request = CheckRequest(profile, candidate, STATE, RUNS, target=target, spare=spare)
    with ExitStack() as bars:

        def progress(text: str) -> Callable[[float], None]:
            bars.pop_all().close()
            shown: Callable[[float], None] = bars.enter_context(bar(text, not quiet))
            return shown

        return run(request, load_target(profile, STATE), progress)


@dataclass(frozen=True)
class Places:
    """Where the reports of a check go, None for those that nobody wants. summary: appended to, the others replaced."""

    junit: Path | None
    markdown: Path | None
    html: Path | None
    summary: Path | None

    @property
    def folders(self) -> tuple[Path, ...]:
        """Where the reports lie, each folder once."""
        return tuple(dict.fromkeys(path.parent for path in (self.junit, self.markdown, self.html) if path is not None))

    def write(self, junit: Content, markdown: Content, html: Content) -> list[DeployError]:
        """Write each report that was asked for; what could not be written comes back."""
        problems = write([(self.junit, junit), (self.markdown, markdown)])
        problems += write([(self.summary, lambda: f"{markdown()}\n")], append=True)
        return [*problems, *write([(self.html, html)])]


def _summary() -> Path | None:
    """The summary of a GitHub Actions job, where there is one."""
    import os

    named = os.environ.get("GITHUB_STEP_SUMMARY")
    return Path(named) if named else None


def _reports(result: CheckResult, places: Places) -> list[DeployError]:
    from pipeline.report import check as shown

    def page() -> str:
        from pipeline.report.check_html import check_page

        return check_page(result.record, result.sessions)

    return places.write(lambda: shown.to_junit([result.record]), lambda: shown.to_markdown(result.record), page)


def _not_measured(profile: str, message: str, places: Places) -> list[DeployError]:
    """Write the reports of a check that ended with an error; what could not be written comes back."""
    from pipeline.report import check as shown

    def page() -> str:
        from pipeline.report.check_html import error_page

        return error_page(profile, message)

    told = shown.junit_error(profile, message), shown.markdown_error(profile, message)
    return places.write(lambda: told[0], lambda: told[1], page)


def _told(error: Exception) -> str:
    """What a report says of an error: sentence and next step, of a bug its kind."""
    from pipeline.cache import refused

    mendable = refused(error) if isinstance(error, OSError) else error
    if isinstance(mendable, DeployError):
        return f"{mendable.message} {mendable.hint}".strip()
    return f"{type(error).__name__}: {error}."


@app.command()
@click.option("--target", metavar="T", help=f"{PROFILE}  [all]")
@click.option("--last", type=click.IntRange(min=1), default=30, show_default=True, help="How many checks.")
@click.option("--html", type=FILE, help="Write a page with plots there.")
@everywhere
def history(target: str | None, last: int, html: Path | None, as_json: bool) -> int:
    """Show the checks of past nights: ratios, verdicts, and where the baseline's own times moved.

    Checks that broke off are inconclusive. Change points are looked for in all nights of each baseline that is shown,
    and are advice only. A check before which the device changed is marked, with the baseline's level on both sides.
    """
    from pipeline.nightly.history import Nights
    from pipeline.nightly.levels import CONTEXT, device_changes
    from pipeline.report import history as shown
    from profiles.schema import load_profile

    name = load_profile(target).name if target else None
    place = STATE / "nights.sqlite"
    if not place.is_file():
        raise UsageError("no check was ever made here.", f"deploy check --target {target or 'T'}")
    writable(html)
    with Nights(place) as nights:
        records = nights.numbered(name, last + CONTEXT)
        moved = device_changes(records)
        records = dict(list(records.items())[-last:])
        pins = dict.fromkeys((record.profile, record.baseline.sha256) for record in records.values())
        changes = [change for pin in pins for change in nights.changes(*pin)]
    moved = tuple(each for each in moved if each.number in records)
    if not as_json:
        shown.show_history(records, terminal(stdout=True), changes, moved)
    problems = write([(html, lambda: shown.history_page(records, changes, moved))])
    return finished(0, problems, shown.history_json(records, changes, moved) if as_json else None)
