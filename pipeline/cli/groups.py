"""`deploy groups`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.cli.frame import (
    FILE,
    PROFILE,
    app,
    everywhere,
    finished,
    overrides_of,
    terminal,
    with_settings,
    writable,
    write,
)
from profiles.errors import UsageError

if TYPE_CHECKING:
    from pipeline.nouns import Block, ChannelGroup, Topology
    from pipeline.project import Project
    from pipeline.prune.picture import Sketch
    from pipeline.report.groups import GroupsData, State
    from pipeline.work import Captured


@app.command()
@click.option("--project", type=click.Path(path_type=Path), default=Path(), help="Folder with deploy.toml.  [here]")
@click.option("--target", metavar="T", default="local", help=f"{PROFILE} Its [prune] keys count here.  [local]")
@click.option("--html", type=FILE, metavar="FILE", help="A page with the network drawn in the colours of its groups.")
@with_settings
@everywhere
def groups(project: Path, target: str, html: Path | None, settings: tuple[str, ...], as_json: bool) -> int:
    """Show which channels would be pruned together, what stays and why. Nothing is trained or measured."""
    from profiles.schema import load_profile

    asked = overrides_of(settings)
    load_profile(target, asked)
    if not (project / "deploy.toml").is_file():
        raise UsageError(f"there is no project file '{project / 'deploy.toml'}'.", "deploy groups --project DIR")
    writable(html)
    console = terminal()
    with console.status("capturing the network and proving its groups"):
        data = _found(project, target, asked)
    problems = write([(html, lambda: _page(data))])
    if not as_json:
        from pipeline.report.groups import show_groups

        show_groups(data, terminal(stdout=True))
        return finished(0, problems)
    from pipeline.report.groups import groups_json

    return finished(0, problems, groups_json(data))


def _page(data: GroupsData) -> str:
    from pipeline.report.groups_html import groups_page

    return groups_page(data)


def _found(folder: Path, target: str, asked: dict[str, Any]) -> GroupsData:
    """What there is to say about a project's network. Raises DeployError for what the user can mend."""
    from pipeline.project import load_project
    from pipeline.prune.groups import find_groups
    from pipeline.prune.picture import sketch
    from pipeline.work import captured, merged
    from profiles.schema import load_profile

    project = load_project(folder)
    spec = load_profile(target, merged(project.overrides, asked)).prune
    heads = spec.attention == "heads"
    found = captured(project, project.model(), spec)
    coupled = find_groups(found.network, freeze=spec.freeze, prove=False, heads=heads).topology
    return _data(project, found, coupled, sketch(found.network, heads=heads))


def _data(project: Project, found: Captured, coupled: Topology, drawn: Sketch) -> GroupsData:
    """coupled: the groups before they were proved, which tells a refuted one from one that was never offered."""
    from pipeline.latency.operations import Operations
    from pipeline.prune.naming import kind_of
    from pipeline.report.groups import BlockEntry, GroupEntry, GroupsData, LeafEntry

    topology, count = found.network.topology, Operations(found.network.topology)
    weights, macs = max(1, count.parameters()), max(1, count.macs())
    before = {group.id: group.frozen for group in coupled.groups} | {b.id: b.frozen for b in coupled.blocks}

    def state(each: ChannelGroup | Block) -> State:
        return "proved" if each.frozen is None else "refuted" if before.get(each.id) is None else "frozen"

    groups = tuple(
        GroupEntry(
            number, group.id, group.name, state(group), group.frozen or "", group.size,
            _channels(topology, group, drawn.made), *_layers(group, drawn.made), group.members,
            1 - count.parameters({group.id: 0}) / weights, 1 - count.macs({group.id: 0}) / macs, group.block or "",
        )
        for number, group in enumerate(topology.groups, 1)
    )  # fmt: skip
    blocks = tuple(
        BlockEntry(
            block.id, state(block), block.frozen or "",
            1 - count.parameters(dropped=(block.id,)) / weights, 1 - count.macs(dropped=(block.id,)) / macs,
        )
        for block in topology.blocks
    )  # fmt: skip
    graph = found.network.graph
    leaves = tuple(LeafEntry(name, kind_of(graph.get_submodule(name)), why) for name, why in topology.leaves)
    least = {group.id: 1 for group in topology.offered}
    return GroupsData(
        project.references["model.factory"].text, str(project.folder), {i.name: i.shape for i in project.inputs},
        count.parameters(), count.macs(), 1 - count.parameters(least) / weights, 1 - count.macs(least) / macs,
        groups, blocks, leaves, drawn.boxes, found.notes,
    )  # fmt: skip


def _layers(group: ChannelGroup, made: frozenset[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Layers that make the channels of a group, and all that hold some, those first."""
    names = {member: member.rpartition("[")[0] for member in group.members}
    layers = {member: name.rpartition(".")[0] or name for member, name in names.items()}
    makers = tuple(dict.fromkeys(layers[member] for member in group.members if member in made))
    return makers, tuple(dict.fromkeys([*makers, *layers.values()]))


def _channels(topology: Topology, group: ChannelGroup, made: frozenset[str]) -> int:
    """Channels of the first layer that makes them: a unit may be several."""
    first = next((member for member in group.members if member in made), group.members[0])
    name, _, axis = first.rstrip("]").rpartition("[")
    own = set(group.units)
    return sum(int(unit) in own for unit in topology.params[name][int(axis)])
