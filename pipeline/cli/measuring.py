"""`deploy measure` and `deploy verify`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.cli.frame import (
    FILE,
    STATE,
    app,
    bar,
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
from profiles.errors import UsageError

if TYPE_CHECKING:
    from targets.harness.measurement import Session


@app.command()
@click.argument("models", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="MODEL.onnx...")
@with_target
@click.option("--paced", metavar="33ms", help="Infer once a control period, and count missed deadlines.")
@click.option("--sustained", metavar="600s", help="Go on for so long, to see what heat does to it.")
@click.option("--out", type=FILE, metavar="FILE", help="Write every raw sample there, as JSON.")
@click.option("--html", type=FILE, metavar="FILE", help="Write a page with pictures there.")
@with_settings
@everywhere
def measure(
    models: tuple[Path, ...],
    target: str | None,
    paced: str | None,
    sustained: str | None,
    out: Path | None,
    html: Path | None,
    settings: tuple[str, ...],
    as_json: bool,
) -> int:
    """Measure ONNX files on a target, interleaved in one session; ratios are to the first one.

    With several of them the first is measured a second time, as 'NAME again': how far its ratio is from 1 says how far
    any may be. A sustained session leaves that out.
    """
    import tempfile

    from pipeline.report import session as shown
    from profiles.schema import load_profile
    from targets.base import load_target

    for model in models:
        if not model.is_file():
            raise UsageError(f"there is no file '{model}'.", "deploy measure MODEL.onnx")
    overrides = overrides_of(settings)
    for key, given, unit, option in (
        ("paced_ms", paced, "ms", "--paced 33ms"), ("sustained_s", sustained, "s", "--sustained 600s")
    ):  # fmt: skip
        if given is not None:
            overrides.setdefault("measure", {})[key] = _quantity(given, unit, option)
    profile = load_profile(target_name(target), overrides)
    writable(out, html)
    device = load_target(profile, STATE)
    device.require_latency()
    names = _names(models)
    with tempfile.TemporaryDirectory() as work, bar("measure", not as_json) as progress:
        places = {model: Path(work) / f"{name}.artifact" for name, model in names.items()}
        device.build_each(places, progress)
        built = {name: places[model] for name, model in names.items()}
        again = _again(names) if len(names) > 1 and not profile.measure.sustained_s else None
        built |= {again: places[models[0]]} if again else {}
        session = device.measure(built, profile.measure.lasting(), "accept", progress)
    if not as_json:
        shown.show_session(session, terminal(stdout=True))
    if session.contamination:
        say(terminal(), f"note: the session is contaminated: {session.contamination}.")
    problems = write([(out, lambda: session.to_json() + "\n"), (html, lambda: _page(session))])
    code = 4 if session.contaminated else 0
    return finished(code, problems, {**shown.session_json(session), "again": again} if as_json else None)


def _again(names: Mapping[str, Path]) -> str:
    """What the second arm of the first network is called, unlike every network."""
    again = f"{next(iter(names))} again"
    while again in names:
        again += " again"
    return again


def _page(session: Session) -> str:
    from pipeline.report.measure_html import measure_page

    return measure_page(session)


def _quantity(text: str, unit: str, example: str) -> float:
    """A number with its unit, which may be left out."""
    try:
        return float(text.strip().lower().removesuffix(unit))
    except ValueError:
        raise UsageError(f"'{text}' is not a time in {unit}.", example) from None


def _names(models: Sequence[Path]) -> dict[str, Path]:
    """A short name for every file: its stem, with a number where two are alike."""
    names: dict[str, Path] = {}
    for model in models:
        name, count = model.stem, 2
        while name in names:
            name, count = f"{model.stem}-{count}", count + 1
        names[name] = model
    return names


@app.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--target", metavar="T", help="Measure both networks again there, and judge the budget anew.")
@with_settings
@everywhere
def verify(bundle: Path, target: str | None, settings: tuple[str, ...], as_json: bool) -> int:
    """Check a bundle: checksums, schema, graphs, the sample's output, and whether its raw samples keep the budget.

    With --target both networks are measured again, and the budget is judged on that. Exit code 1 for a bundle that is
    not whole, 3 for a budget or an accuracy that was missed, 4 where the samples decide nothing or there are none.
    """
    import tempfile

    from pipeline.nouns import BUILT
    from pipeline.release import verify as check
    from profiles.schema import load_profile
    from targets.base import load_target

    problems = check.verify(bundle, load_target(load_profile("local"), STATE).infer)
    told: dict[str, Any] = {"bundle": str(bundle), "problems": problems}
    code = 1 if problems else 0
    if not problems:
        told["accuracy_unjudged"] = check.read_manifest(bundle).accuracy.unjudged
        verdict, reason = check.recorded(bundle)
        if target is not None:
            device = load_target(load_profile(target, overrides_of(settings)), STATE)
            with tempfile.TemporaryDirectory() as work, bar("measure", not as_json) as progress:
                judged, _ = check.measure_again(bundle, device, Path(work), progress)
            verdict, reason = judged.verdict, judged.reason
        told |= {"verdict": verdict, "reason": reason}
        code = {"met": 0, "undecided": 4, BUILT: 4}.get(verdict, 3)
    told["exit_code"] = code
    if as_json:
        print_json(told)
        return code
    console = terminal(stdout=True)
    for problem in problems:
        say(console, problem)
    if not problems:
        say(console, f"{bundle} is whole: checksums, schema, graphs and the sample's output agree.")
        if told["accuracy_unjudged"]:
            say(console, f"its accuracy was not judged: {told['accuracy_unjudged']}.")
    if "verdict" in told:
        say(console, f"{told['verdict']}: {told['reason']}")
    return code
