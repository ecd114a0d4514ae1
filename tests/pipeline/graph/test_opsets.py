"""Every opset that a profile may ask for: exported, optimised, narrowed, cut into rows and in half, and run."""

import onnx
import pytest
import torch
from graph_samples import Mixed, Residual, ResNet, shaken
from pydantic import ValidationError
from torch import nn

from pipeline.graph.export import export
from pipeline.graph.narrow import narrow
from pipeline.graph.optimize import optimize_model
from pipeline.graph.precision.half import halve
from pipeline.graph.rows import Rows
from pipeline.graph.verify import check_model, compare_outputs, open_session, seeded_inputs
from pipeline.nouns import KeepUnits, PruningPlan
from pipeline.prune.capture import capture
from pipeline.prune.groups import find_groups
from pipeline.prune.plan import resolve
from pipeline.prune.surgery import prune
from profiles.schema import GraphSpec, InputSpec

SHAPE = (1, 3, 16, 16)


class Gated(nn.Module):
    """Channels scaled by what a layer makes of their means, in front of a shortcut that strides and pads them."""

    def __init__(self):
        super().__init__()
        self.stem, self.gate, self.block = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 8, 1), Residual(8, 16, 2)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        return self.block(x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True))))


@pytest.fixture(scope="module", params=[ResNet, Mixed, Gated], ids=["resnet", "mixed", "gated"])
def network(request):
    return find_groups(capture(shaken(request.param()), (torch.randn(SHAPE),)), prove=False)


def halves(topology):
    """A plan that keeps every other unit of each group."""
    return PruningPlan(tuple(KeepUnits(group.id, tuple(range(0, group.size, 2))) for group in topology.offered))


@pytest.mark.parametrize("opset", range(11, 21))
def test_a_network_goes_all_the_way_in_every_opset(network, opset, tmp_path):
    topology, plan = network.topology, halves(network.topology)
    spec = GraphSpec(opset=opset)
    path = export(network.graph, [InputSpec(shape=SHAPE)], tmp_path / "dense.onnx", spec.opset)
    model, log = optimize_model(onnx.load(str(path)), spec.passes)
    assert [entry.version for entry in model.opset_import] == [opset]
    assert next(step for step in log.steps if step.name == "fold-constants").changed

    small, pruned = narrow(model, resolve(topology, plan)), prune(network, plan).eval()
    check_model(small)
    with torch.no_grad():
        gap = compare_outputs(lambda x: pruned(torch.from_numpy(x)).numpy(), small, seeded_inputs(small))
    assert gap.max_rel < 1e-5

    rows = Rows(model, topology, lambda plan: resolve(topology, plan))
    for site in rows.sites:
        widths = plan.widths(topology.groups)
        row = onnx.load_from_string(rows.row(site, tuple(dim.size(widths) for dim in site.dims)))
        check_model(row)
        open_session(row)

    half, _ = halve(small, seeded_inputs(small))
    check_model(half)
    assert compare_outputs(small, half, seeded_inputs(small)).max_rel < 0.02


@pytest.mark.parametrize("opset", [10, 21])
def test_other_opsets_are_refused(opset):
    with pytest.raises(ValidationError, match=r"should be (less|greater) than or equal to"):
        GraphSpec(opset=opset)
