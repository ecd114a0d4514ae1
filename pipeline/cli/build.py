"""`deploy build`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.cli.frame import (
    STATE,
    app,
    everywhere,
    exists,
    overrides_of,
    print_json,
    target_name,
    terminal,
    with_settings,
)
from profiles.errors import UsageError

if TYPE_CHECKING:
    from pipeline.run import BuildRequest


@app.command()
@click.option("--target", metavar="T", help="A profile's name (deploy list profiles) or a TOML file of your own.")
@click.option("--project", type=click.Path(path_type=Path), default=Path(), help="Folder with deploy.toml.  [here]")
@click.option("--budget", metavar="8ms|0.5x", help="Latency to keep: absolute, or a share of the dense network's.")
@click.option("--criterion", metavar="C", help="What orders the channels of a group (deploy list criteria).")
@click.option("--solver", metavar="S", help="What chooses the widths (deploy list solvers).")
@click.option("--repair", metavar="R", help="none, bn, merge, layerwise or least-squares.")
@click.option("--rounds", type=int, metavar="N", help="Most turns of predict, measure, correct.")
@with_settings
@click.option("--out", type=click.Path(path_type=Path), metavar="RUN", help="Folder of the run.  [runs/DATE-TARGET]")
@click.option("--resume", is_flag=True, help="Go on with the latest unfinished run, or with the one that --out names.")
@click.option("--dry-run", is_flag=True, help="Groups, table and solved plan; no training, no bundle.")
@everywhere
def build(as_json: bool, resume: bool, out: Path | None, **options: Any) -> int:
    """Prune a project's network to a latency budget and write the release bundle.

    For a card that is not here (--target rtx) the network is built as it is, and said not to be measured: exit code 4.
    """
    from pipeline.run import BuildRequest, latest_unfinished

    if resume:
        asked = [name for name, value in options.items() if value and value != Path()]
        if asked:
            name = asked[0].replace("settings", "set").replace("_", "-")
            message = f"--resume goes on with what was asked before, and takes no --{name}."
            raise UsageError(message, "deploy build --resume, or --resume --out RUN")
        request = BuildRequest.again(out or latest_unfinished(Path()), terminal())
    else:
        request = _request(out, **options)
    from pipeline import flow

    result = flow.build(request)
    from pipeline.report import text

    if as_json:
        print_json(dict(result.summary))
    elif result.report is not None:
        text.show(result.report, terminal(stdout=True))
    elif result.summary.get("dry_run"):
        text.show_dry(result.summary, terminal(stdout=True))
    return int(result.exit_code)


def _request(
    out: Path | None, target: str | None, project: Path, budget: str | None, settings: tuple[str, ...], dry_run: bool,
    criterion: str | None, solver: str | None, repair: str | None, rounds: int | None,
) -> BuildRequest:  # fmt: skip
    """A checked `BuildRequest`: every name in it exists, before anything heavy is imported."""
    from pipeline.run import BuildRequest
    from profiles.schema import Budget, load_profile
    from targets.base import load_target

    overrides = overrides_of(settings)
    chosen = {"criterion": criterion, "solver": solver, "repair": repair, "rounds": rounds}
    overrides.setdefault("prune", {}).update({name: value for name, value in chosen.items() if value is not None})
    overrides = {name: table for name, table in overrides.items() if table != {}}
    if budget is not None:
        Budget.parse(budget)
    profile = load_profile(target_name(target), overrides)
    exists("criteria", profile.prune.criterion)
    exists("solvers", profile.prune.solver)
    exists("targets", profile.target)
    for name in profile.graph.candidates:
        exists("candidates", name)
    for name in (*profile.prepare.hooks, *profile.recover.hooks):
        exists("hooks", name)
    if budget is None and profile.budget is None and load_target(profile, STATE).latency().ok:
        raise UsageError(f"there is no budget: profile '{profile.name}' has none.", "--budget 0.5x, or --budget 8ms.")
    if not (project / "deploy.toml").is_file():
        raise UsageError(f"there is no project file '{project / 'deploy.toml'}'.", "deploy build --project DIR")
    return BuildRequest(project, target_name(target), budget, overrides, out, False, dry_run, Path(), terminal())
