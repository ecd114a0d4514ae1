"""The zoo: how Torch-Pruning's cuts are judged, what is run again, and what the table says."""

import json
import time

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks import zoo
from benchmarks.coupling import depgraph, networks, table
from benchmarks.coupling.steps import Record, difference, judge
from pipeline.prune.proof import randomised


class Flattened(nn.Module):
    """A convolution and a linear layer over its map, channels before or after the positions."""

    def __init__(self, channels_last: bool) -> None:
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv2d(3, 4, 3), nn.LayerNorm(16), nn.Linear(16, 2)
        self.channels_last = channels_last

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.out((x.permute(0, 2, 3, 1) if self.channels_last else x).flatten(1))


IMAGE = (torch.randn(1, 3, 4, 4),)


def cut_by_hand(model: nn.Module, columns: list[int]) -> nn.Module:
    """Channel 1 of the convolution is removed, and with it the columns of the linear layer that are not given."""
    for parameter, axis, left in ((model.conv.weight, 0, [0, 2, 3]), (model.conv.bias, 0, [0, 2, 3]),
                                  (model.out.weight, 1, columns)):  # fmt: skip
        index = torch.tensor(left)
        fresh = nn.Parameter(parameter.data.index_select(axis, index))
        fresh.grad = parameter.grad.index_select(axis, index)
        owner, name = next((m, n) for m in (model.conv, model.out) for n, p in m.named_parameters() if p is parameter)
        setattr(owner, name, fresh)
    model.conv.out_channels, model.out.in_features = 3, 12
    return model


def by_hand(monkeypatch, columns):
    """A Torch-Pruning that is played by this cut."""
    monkeypatch.setattr(depgraph, "prune", lambda model, inputs, ignored: cut_by_hand(model, columns))
    monkeypatch.setattr(depgraph.metadata, "version", lambda name: "by hand")


def test_a_cut_that_removes_what_belongs_together_is_equal(monkeypatch):
    by_hand(monkeypatch, [0, 1, 2, 3, 8, 9, 10, 11, 12, 13, 14, 15])
    found = depgraph.judge(Flattened(False), IMAGE, None)
    assert found["outcome"] == "equal"
    assert found["difference"] < 1e-12
    assert found["parameters_removed_at_30"] == pytest.approx(1 - (3 * 28 + 26 + 32) / (4 * 28 + 34 + 32), abs=1e-4)


def test_a_cut_that_removes_other_columns_than_the_channels_is_silently_wrong(monkeypatch):
    by_hand(monkeypatch, [0, 1, 2, 3, 8, 9, 10, 11, 12, 13, 14, 15])
    found = depgraph.judge(Flattened(True), IMAGE, None)
    assert found["outcome"] == "wrong"
    assert found["difference"] > 1e-3


def test_a_cut_that_does_not_run_is_broken_and_says_why(monkeypatch):
    by_hand(monkeypatch, list(range(11)))
    found = depgraph.judge(Flattened(False), IMAGE, None)
    assert found["outcome"] == "broken"
    assert "cannot be multiplied" in found["reason"]


def test_nothing_cut_and_an_error_while_cutting_are_outcomes_of_their_own(monkeypatch):
    by_hand(monkeypatch, [])
    monkeypatch.setattr(depgraph, "prune", lambda model, inputs, ignored: None)
    assert depgraph.judge(Flattened(False), IMAGE, None)["outcome"] == "nothing"

    def refuse(model, inputs, ignored):
        raise KeyError("conv")

    monkeypatch.setattr(depgraph, "prune", refuse)
    found = depgraph.judge(Flattened(False), IMAGE, None)
    assert (found["outcome"], found["reason"]) == ("refused", "KeyError: 'conv'")


def test_without_torch_pruning_its_column_says_so(monkeypatch):
    def missing(name):
        raise depgraph.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(depgraph.metadata, "version", missing)
    assert depgraph.judge(Flattened(False), IMAGE, None) == {
        "outcome": "absent",
        "reason": "torch-pruning is not installed",
    }


def test_torch_pruning_itself_cuts_a_plain_network_right_and_a_permuted_one_wrong():
    pytest.importorskip("torch_pruning", reason="needs torch-pruning of the extra `bench`")
    outcomes = [depgraph.judge(Flattened(last), IMAGE, None)["outcome"] for last in (False, True)]
    assert outcomes == ["equal", "wrong"]


def test_layers_of_the_output_are_ignored_as_ours_found_them_or_by_their_width():
    model = Flattened(False)
    record = Record()
    network = judge(record, model, IMAGE, trained=True)
    assert record["cut_equal"]
    assert record["trained_difference"] < 1e-12
    assert depgraph.ignored(model, [], network) == [model.out]
    assert depgraph.ignored(model, [torch.zeros(1, 2)], None) == [model.out]


def test_norms_of_the_reference_see_only_what_is_left():
    norm = randomised(nn.Sequential(nn.LayerNorm(4)), 1)
    x = torch.randn(2, 4, dtype=torch.float64)
    weight, bias = norm[0].weight.data.clone(), norm[0].bias.data.clone()
    gone = torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    with depgraph.masked(norm, {"0.weight": gone, "0.bias": gone}), torch.no_grad():
        got = norm(x)
    left = [0, 2, 3]
    torch.testing.assert_close(got[:, left], functional.layer_norm(x[:, left], (3,), weight[left], bias[left]))
    assert norm(x).shape == x.shape
    assert "forward" not in vars(norm[0])


def test_attention_is_given_the_scale_that_is_asked_for_and_its_own_again_afterwards():
    q = torch.randn(1, 1, 3, 4)
    plain = functional.scaled_dot_product_attention(q, q, q)
    with depgraph.scaled(lambda width: 1.0 if width == 4 else None):
        scaled = functional.scaled_dot_product_attention(q, q, q)
    torch.testing.assert_close(scaled, (q @ q.transpose(-1, -2)).softmax(-1) @ q)
    assert torch.equal(functional.scaled_dot_product_attention(q, q, q), plain)


def test_numbers_that_are_none_and_shapes_that_differ_are_infinitely_far():
    assert difference([torch.zeros(2)], [torch.full((2,), float("nan"))]) == float("inf")
    assert difference([torch.zeros(2)], [torch.zeros(3)]) == float("inf")
    assert difference([torch.ones(2)], [torch.tensor([1.0, 0.0])]) == 0.5


# --- rows ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(networks, "families", lambda: {"a": lambda: ["x", "y"], "b": lambda: ["xx"]})


def test_rows_of_older_code_are_run_again_where_the_pattern_fits(few):
    rows = {("a", "x"): {"code": "older"}, ("b", "xx"): {"code": zoo.version()}, ("a", "y"): {}}
    assert zoo.waiting(rows, None, [], None) == []
    assert zoo.waiting({}, "a", ["y"], None) == [("a", "y")]
    assert zoo.waiting(rows, None, [], "*") == [("a", "x"), ("a", "y")]
    assert zoo.waiting(rows, None, [], "a/x*") == [("a", "x")]
    assert zoo.waiting(rows, "b", [], "*") == []


@pytest.mark.parametrize("more", [{"failed": "more than 1 s"}, {"torch_pruning": {"outcome": "late"}}])
def test_what_was_stopped_is_run_again_though_the_code_is_the_same(few, more):
    whole = {"code": zoo.version(), "torch_pruning": {"outcome": "wrong"}}
    assert zoo.waiting({("a", "x"): whole, ("a", "y"): whole | more}, "a", [], "*") == [("a", "y")]


def test_a_row_takes_the_place_of_its_older_one(tmp_path, capsys):
    path = tmp_path / "zoo.jsonl"
    zoo.keep(path, {"family": "b", "name": "n", "offered": 1})
    zoo.keep(path, {"family": "a", "name": "n"})
    zoo.keep(path, {"family": "b", "name": "n", "offered": 2})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"family": "a", "name": "n"},
        {"family": "b", "name": "n", "offered": 2},
    ]


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        (0.0, 0.0, {"captured": True, "torch_pruning": {"outcome": "equal"}}),
        (0.0, 5.0, {"captured": True, "torch_pruning": {"outcome": "late", "reason": "more than 1 s"}}),
        (5.0, 0.0, {"failed": "more than 2 s"}),
    ],
)
def test_what_takes_too_long_costs_its_own_column_only(monkeypatch, ours, theirs, expected):
    def slow(family, name, size):
        time.sleep(ours)
        yield {"captured": True}
        time.sleep(theirs)
        yield {"captured": True, "torch_pruning": {"outcome": "equal"}}

    monkeypatch.setattr(zoo, "steps", slow)
    row = zoo._apart("a", "x", 64, (2, 1))
    assert {key: row[key] for key in expected} == expected
    assert row.keys() - expected.keys() == {"family", "name", "code", "total_s"}


# --- the table -----------------------------------------------------------------------------------------------------


def row(layers: int, seconds: float, outcome: str, **more: object) -> dict[str, object]:
    return {
        "captured": True, "layers": layers, "offered": 3, "refuted": {}, "cut_equal": True, "onnx_equal": True,
        "narrow_equal": False, "macs_touched": 1.0, "macs_removed_at_30": 0.5,
        "seconds": {"capture": seconds / 4, "groups": seconds / 4, "proofs": seconds / 2},
        "torch_pruning": {"outcome": outcome, "macs_touched": 0.25, "macs_removed_at_30": 0.125, "seconds": 2.0},
    } | more  # fmt: skip


def test_the_table_counts_ours_and_torch_pruning_beside_it():
    rows = {
        ("a", "one"): row(10, 1.0, "equal", beside="a build"),
        ("a", "two"): row(100, 10.0, "wrong", refuted={"no": 2}, macs_touched=0.5),
        ("b", "three"): {"failed": "more than 1 s"},
    }
    lines = table.markdown(rows).splitlines()
    assert "| **all** | 3 | 2 | 2 | 1 | 2 | 0 | 2 | 0 | 75.0 % | 50.0 % |" in lines
    assert "| **all** | 2 | 1 | 1 | 25.0 % | 100.0 % | 12.5 % | 50.0 % |" in lines
    assert (
        "| a/one | 10 | 3 | 0 | 100.0 % | 50.0 % | equal | equal | differs | 1.0* | equal | 25.0 % | 12.5 % | 2.0 |"
        in lines
    )
    assert "| b/three | - | - | 0 | - | - | - | - | - | - | - | - | - | - |" in lines


def test_seconds_that_are_proportional_to_layers_grow_with_their_first_power(tmp_path):
    rows = {("a", str(n)): row(n, n / 10, "equal") for n in (10, 40, 160)}
    assert table.growth(list(rows.values())) == pytest.approx(1.0)
    table.draw(rows, tmp_path / "zoo.png")
    assert (tmp_path / "zoo.png").read_bytes()[1:4] == b"PNG"


def test_a_detector_gives_its_heads_and_of_two_stages_its_maps_too():
    class Backbone(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"0": x, "1": x[..., ::2, ::2]}

    class Head(nn.Module):
        def forward(self, maps: list[Tensor]) -> list[Tensor]:
            return [x.mean() for x in maps]

    one, two = nn.Module(), nn.Module()
    one.backbone, one.head = Backbone(), Head()
    two.backbone, two.rpn = Backbone(), nn.Module()
    two.rpn.head = Head()
    x = torch.randn(1, 2, 4, 4)
    assert [len(part) for part in networks.Detector(one)(x)] == [2]
    heads, *maps = networks.Detector(two)(x)
    assert (len(heads), [tuple(m.shape) for m in maps]) == (2, [(1, 2, 4, 4), (1, 2, 2, 2)])
