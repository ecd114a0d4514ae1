import dataclasses
import time

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from graph_samples import Mixed, Mobile, ResNet, shaken
from torch import nn

from pipeline.graph.export import export
from pipeline.graph.narrow import narrow
from pipeline.graph.optimize import optimize_model
from pipeline.graph.precision.half import halve
from pipeline.graph.probe import find_forms, tensor_shapes
from pipeline.graph.rows import Rows
from pipeline.graph.verify import check_model, open_session, seeded_inputs
from pipeline.nouns import Cut, DropBlock, KeepUnits, PruningPlan, RowBuilder
from pipeline.prune.capture import capture
from pipeline.prune.groups import find_groups
from pipeline.prune.plan import resolve
from profiles.errors import DeployError
from profiles.schema import GraphSpec, InputSpec

FLOAT, FLOAT16 = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16


class Sample:
    """A network, its optimised dense graph and its rows."""

    def __init__(self, net, folder, shape=(1, 3, 16, 16), half=False):
        network = find_groups(capture(shaken(net), (torch.randn(shape),)), prove=False)
        path = export(network.graph, [InputSpec(shape=shape)], folder / "dense.onnx")
        self.model, _ = optimize_model(onnx.load(str(path)), GraphSpec().passes)
        if half:
            self.model, _ = halve(self.model, seeded_inputs(self.model))
        self.topology = network.topology
        self.rows = Rows(self.model, self.topology, self.resolve)
        self.full = PruningPlan().widths(self.topology.groups)

    def resolve(self, plan):
        return resolve(self.topology, plan)

    def group(self, name):
        return next(group for group in self.topology.groups if group.name == name)

    def site(self, id):
        return next(site for site in self.rows.sites if site.id == id)

    def widths(self, site, plan=None):
        widths = (plan or PruningPlan()).widths(self.topology.groups)
        return tuple(dim.size(widths) for dim in site.dims)


class Attention(nn.Module):
    """One transformer block without heads: norms, three products of weights, two of activations."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 4, 4), nn.LayerNorm(8)
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = torch.flatten(self.stem(x), 2).transpose(1, 2)
        y = self.norm(x)
        scores = torch.softmax(self.q(y) @ self.k(y).transpose(1, 2) / 8**0.5, -1)
        return self.head((x + self.o(scores @ self.v(y))).mean(1))


class Squeeze(nn.Module):
    """A convolution whose channels are scaled by what two small layers make of their means."""

    def __init__(self):
        super().__init__()
        self.a, self.down, self.up, self.last = (
            nn.Conv2d(3, 8, 3, 1, 1),
            nn.Conv2d(8, 4, 1),
            nn.Conv2d(4, 8, 1),
            nn.Conv2d(8, 3, 1),
        )

    def forward(self, x):
        x = F.silu(self.a(x))
        return self.last(x * torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1))))))


NETS = {
    "resnet": lambda: ResNet(2),
    "mobile": Mobile,
    "mixed": Mixed,
    "attention": Attention,
    "squeeze": Squeeze,
}


@pytest.fixture(scope="module", params=[*NETS, *(f"{name} in half" for name in NETS)])
def sample(request, tmp_path_factory):
    net = NETS[request.param.removesuffix(" in half")]()
    return Sample(net, tmp_path_factory.mktemp("rows"), half=request.param.endswith(" in half"))


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    return Sample(ResNet(3), tmp_path_factory.mktemp("half"), half=True)


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    return Sample(ResNet(3), tmp_path_factory.mktemp("resnet"))


def some_plan(topology, seed):
    rng = np.random.default_rng(seed)
    gone = {block.id for block in topology.removable if rng.random() < 0.3}
    edits = [DropBlock(id) for id in sorted(gone)]
    edits += [
        KeepUnits(g.id, tuple(range(int(rng.integers(1, g.size + 1))))) for g in topology.offered if g.block not in gone
    ]
    return PruningPlan(tuple(edits))


def test_rows_are_the_row_builder_of_the_table(sample):
    builder: RowBuilder = sample.rows
    assert len({site.id for site in builder.sites}) == len(builder.sites)


def test_every_node_is_in_exactly_one_site(sample):
    placed = [name for site in sample.rows.sites for name in site.nodes]
    assert sorted(placed) == sorted(node.name for node in sample.model.graph.node)


def test_channel_counts_of_a_narrowed_graph_are_those_of_its_dims(sample):
    forms = find_forms(sample.model, sample.topology, sample.resolve)
    for seed in range(4):
        edits = [edit for edit in some_plan(sample.topology, seed).edits if isinstance(edit, KeepUnits)]
        plan = PruningPlan(tuple(edits))
        widths = plan.widths(sample.topology.groups)
        shapes = tensor_shapes(narrow(sample.model, sample.resolve(plan)))
        for node in sample.model.graph.node:
            for name in node.output:
                assert tuple(dim.size(widths) for dim in forms.dims[name]) == shapes[name]


def test_every_row_is_valid_and_runs_at_any_widths(sample):
    for seed in range(3):
        plan = some_plan(sample.topology, seed) if seed else PruningPlan()
        for site in sample.rows.sites:
            for dropped in (False, True) if site.block else (False,):
                for copies in sample.rows.copies(site, dropped=dropped):
                    row = sample.rows.row(site, sample.widths(site, plan), copies=copies, dropped=dropped)
                    model = onnx.load_from_string(row)
                    check_model(model)
                    for result in open_session(model).run(None, seeded_inputs(model, 0, 1)[0]):
                        assert np.isfinite(result).all() and np.abs(result).max() < 1e3


def heavy_work(model):
    """Multiply-accumulates of convolutions and matrix products, from shapes alone."""
    shapes, total = tensor_shapes(model), 0
    for node in model.graph.node:
        if node.op_type == "Conv":
            total += int(np.prod(shapes[node.output[0]]) * np.prod(shapes[node.input[1]][1:]))
        elif node.op_type == "ConvTranspose":
            total += int(np.prod(shapes[node.input[0]]) * np.prod(shapes[node.input[1]][1:]))
        elif node.op_type in ("Gemm", "MatMul"):
            total += int(np.prod(shapes[node.output[0]]) * shapes[node.input[0]][-1])
    return total


def test_the_work_of_all_sites_is_the_work_of_the_narrowed_graph(sample):
    for seed in range(4):
        plan = some_plan(sample.topology, seed)
        total = 0.0
        for site in sample.rows.sites:
            terms = sample.rows.terms(site, sample.widths(site, plan), dropped=site.block in plan.dropped)
            total += sum(value for name, value in terms.items() if name != "elements")
        assert total == heavy_work(narrow(sample.model, sample.resolve(plan)))


def test_copies_differ_by_the_work_of_the_site(sample):
    for site in sample.rows.sites:
        few, many = sample.rows.copies(site)
        widths = sample.widths(site)
        works = [heavy_work(onnx.load_from_string(sample.rows.row(site, widths, copies=n))) for n in (few, many)]
        terms = sample.rows.terms(site, widths)
        assert works[1] - works[0] == (many - few) * sum(v for name, v in terms.items() if name != "elements")


# --- what the sites of a residual network are ------------------------------------------------------------------------


def test_a_residual_network_is_cut_into_stem_blocks_and_head(resnet):
    kinds = [(site.id, site.kind, site.block) for site in resnet.rows.sites]
    assert kinds[0] == ("conv1", "conv3x3", None)
    assert [kind for _, kind, _ in kinds[1:-1]] == ["block"] * 3 + ["transition"] + ["block"] * 2
    assert all(block is not None for _, _, block in kinds[1:-1])
    assert kinds[-1] == ("linear", "gemm", None)


def test_dims_are_the_stream_then_the_inner_width_then_the_grown_stream(resnet):
    into, inner, grown = (resnet.group(f"{name}").id for name in ("conv1", "blocks.3.conv1", "blocks.3.conv2"))
    transition = next(site for site in resnet.rows.sites if site.kind == "transition")
    assert [dict(dim.terms) for dim in transition.dims] == [{into: 1}, {inner: 1}, {into: 1, grown: 1}]
    assert [dim.size(resnet.full) for dim in transition.dims] == [8, 16, 16]


def test_equal_blocks_share_their_rows(resnet):
    first, second, third = (
        site for site in resnet.rows.sites if site.kind == "block" and resnet.widths(site) == (8, 8)
    )
    rows = {resnet.rows.row(site, (8, 4), copies=3) for site in (first, second, third)}
    assert len(rows) == 1
    assert resnet.rows.row(first, (8, 4), copies=3) == resnet.rows.row(first, (8, 4), copies=3)
    assert resnet.rows.row(first, (8, 4), copies=1) not in rows


def test_a_removed_identity_block_leaves_nothing_to_measure(resnet):
    site = next(site for site in resnet.rows.sites if site.kind == "block")
    few, many = resnet.rows.copies(site, dropped=True)
    rows = {resnet.rows.row(site, (8, 8), copies=n, dropped=True) for n in (few, many)}
    assert rows == {resnet.rows.empty()}
    assert resnet.rows.terms(site, (8, 8), dropped=True) == {"elements": 0.0}


def test_a_removed_transition_leaves_its_shortcut(resnet):
    site = next(site for site in resnet.rows.sites if site.kind == "transition")
    terms = resnet.rows.terms(site, (8, 16, 16), dropped=True)
    assert terms == {"elements": 16 * 8 * 8.0, "conv1x1s2": 16 * 8 * 8 * 8.0}
    assert set(resnet.rows.terms(site, (8, 16, 16))) == {"elements", "conv3x3s2", "conv3x3", "conv1x1s2"}


def test_a_stream_that_comes_from_convolutions_comes_from_one_in_its_row(resnet):
    block = next(site for site in resnet.rows.sites if site.kind == "block")
    nodes = [node.op_type for node in onnx.load_from_string(resnet.rows.row(block, (8, 8), copies=1)).graph.node]
    assert nodes[0] == "Conv" and nodes[-1] == "GlobalMaxPool"
    assert nodes.count("Conv") == 3
    stem = onnx.load_from_string(resnet.rows.row(resnet.rows.sites[0], (8,), copies=2))
    assert [d.dim_value for d in stem.graph.input[0].type.tensor_type.shape.dim] == [1, 3, 16, 16]


def test_copies_of_a_layer_add_up_so_that_none_is_dead(resnet):
    stem = onnx.load_from_string(resnet.rows.row(resnet.rows.sites[0], (8,), copies=6))
    assert sum(node.op_type == "Add" for node in stem.graph.node) == 6
    assert len(stem.graph.output) == 1


def test_without_a_following_activation_the_block_is_still_one_site(tmp_path):
    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.a, self.b = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 1, 1)
            self.last = nn.Conv2d(8, 2, 1)

        def forward(self, x):
            x = self.stem(x)
            return self.last(x + self.b(F.relu(self.a(x))))

    sample = Sample(Linear(), tmp_path)
    assert [site.kind for site in sample.rows.sites] == ["conv3x3", "block", "conv1x1"]


def test_integers_do_not_come_in_the_layout_of_convolutions(tmp_path):
    class Stepped(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x):
            return self.b(F.relu(self.a(x)).to(torch.int32).to(torch.float32))

    sample = Sample(Stepped(), tmp_path)
    carried = {node.op_type: sample.rows.carried(node.output[0]) for node in sample.model.graph.node[:3]}
    assert carried == {"Conv": True, "Relu": True, "Cast": False}
    last = sample.site("b")
    row = onnx.load_from_string(sample.rows.row(last, sample.widths(last), copies=sample.rows.copies(last)[1]))
    assert open_session(row).run(None, seeded_inputs(row, 0, 1)[0])


# --- in half precision -----------------------------------------------------------------------------------------------


def border_types(row):
    """Types of the inputs and outputs of a row."""
    infos = onnx.load_from_string(row).graph
    return [[i.type.tensor_type.elem_type for i in part] for part in (infos.input, infos.output)]


def test_rows_in_half_are_half_inside_and_float32_where_the_network_begins_and_ends(half):
    sites = half.rows.sites
    for site in sites:
        row = half.rows.row(site, half.widths(site), copies=half.rows.copies(site)[1])
        inputs, outputs = border_types(row)
        assert (FLOAT in outputs) == (site is sites[-1]) and set(outputs) <= {FLOAT, FLOAT16}
        assert set(inputs) == ({FLOAT16, FLOAT} if site is sites[0] else {FLOAT16})
        floating = {t.data_type for t in onnx.load_from_string(row).graph.initializer} - {onnx.TensorProto.INT64}
        assert floating == {FLOAT16}
        casts = [n for n in onnx.load_from_string(row).graph.node if n.op_type == "Cast"]
        assert bool(casts) == (site in (sites[0], sites[-1])), "casts stand where they stand in the network"


def test_sites_in_half_are_those_of_float32_measured_the_same_way(half, resnet):
    both = [[(site.id, site.kind, site.chainable) for site in each.rows.sites] for each in (half, resnet)]
    assert both[0] == both[1]
    for a, b in zip(half.rows.sites, resnet.rows.sites, strict=True):
        assert half.rows.copies(a) == resnet.rows.copies(b)
        assert half.rows.row(a, half.widths(a)) != resnet.rows.row(b, resnet.widths(b))


def test_a_removed_transition_in_half_leaves_its_shortcut_in_half(half):
    site = next(site for site in half.rows.sites if site.kind == "transition")
    many = half.rows.copies(site, dropped=True)[1]
    row = onnx.load_from_string(half.rows.row(site, (8, 16, 16), copies=many, dropped=True))
    assert {t.data_type for t in row.graph.initializer} == {FLOAT16}


# --- what cannot be --------------------------------------------------------------------------------------------------


def test_wrong_numbers_of_widths_or_copies_are_refused(resnet):
    site, head = resnet.rows.sites[1], resnet.rows.sites[-1]
    with pytest.raises(ValueError, match=r"site '.*' has 2 channel counts, 1 were given"):
        resnet.rows.row(site, (8,))
    with pytest.raises(ValueError, match="site 'linear' cannot be measured with 2 copies"):
        resnet.rows.row(head, (16,), copies=2)
    with pytest.raises(ValueError, match="has no channels left"):
        resnet.rows.row(site, (8, 0))


def test_a_shape_that_is_no_sum_of_widths_is_an_error(resnet):
    def twisted(plan):
        cut = resnet.resolve(plan)
        if len(plan.edits) < 2:
            return cut
        return dataclasses.replace(cut, params={**cut.params, "conv1.weight": {0: np.arange(2)}})

    with pytest.raises(DeployError, match=r"^the shape of '.*' does not follow from the group widths: "):
        find_forms(resnet.model, resnet.topology, twisted)


def probes(sample):
    """The forms of a graph, and how often it was cut to find them."""
    asked = []
    return find_forms(sample.model, sample.topology, lambda plan: asked.append(plan) or sample.resolve(plan)), asked


def test_probes_are_far_fewer_than_groups(tmp_path):
    few, many = (Sample(ResNet(n, (4, 8, 16), 10), tmp_path, (1, 3, 8, 8)) for n in (2, 12))
    assert len(many.topology.offered) == len(few.topology.offered) + 30
    assert len(probes(many)[1]) <= len(probes(few)[1]) + 4


class Crossed(nn.Module):
    """Two pairs of layers: a concatenation of both holds the channels of two groups, and no parameter does."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(3, 12, 3, 1, 1)
        self.c, self.d = nn.Conv2d(8, 8, 1), nn.Conv2d(12, 8, 1)

    def forward(self, x):
        left, right = torch.split(F.relu(torch.cat([self.a(x), self.b(x)], 1)), (8, 12), 1)
        return self.c(left).mean((2, 3)) @ self.d(right).mean((2, 3)).T


def test_groups_that_share_an_axis_of_no_parameter_are_told_apart(tmp_path):
    sample = Sample(Crossed(), tmp_path, (2, 3, 8, 8))
    sizes = {group.id: group.size for group in sample.topology.offered}
    joined = next(node.output[0] for node in sample.model.graph.node if node.op_type == "Concat")
    (channels,) = (dim for dim in probes(sample)[0].dims[joined] if dim.terms)
    assert len(channels.terms) == 2 and channels.constant == 0
    assert sum(count * sizes[group] for group, count in channels.terms) == 20


def test_rows_of_resnet56_are_found_in_two_seconds(tmp_path):
    sample = Sample(ResNet(9, (4, 8, 16), 10), tmp_path, (1, 3, 8, 8))
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        Rows(sample.model, sample.topology, sample.resolve)
        seconds.append(time.perf_counter() - began)
    assert len(sample.rows.sites) == 29
    assert min(seconds) < 2


def test_cut_of_nothing_is_the_dense_graph(resnet):
    assert tensor_shapes(narrow(resnet.model, Cut({}, {}))) == tensor_shapes(resnet.model)
