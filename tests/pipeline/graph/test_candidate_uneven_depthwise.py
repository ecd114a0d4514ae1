"""Candidates are exact rewrites; uneven depthwise separation computes each distinct kernel once."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from graph_samples import Mixed, Mobile, ResNet, graph, imported, node, ops, shaken, weights

from pipeline.graph import rewriting
from pipeline.graph.absorbed import absorbed
from pipeline.graph.candidates.base import PACKAGE, Offers
from pipeline.graph.candidates.uneven_depthwise import separate
from pipeline.graph.export import export
from pipeline.graph.optimize import optimize_model
from pipeline.graph.passes.base import PassResult
from pipeline.graph.rewriting import Timing, choose, offered, rewritten
from pipeline.graph.verify import check_model, compare_outputs, seeded_inputs
from pipeline.prune.capture import capture
from profiles import plugins
from profiles.errors import DeployError, UsageError
from profiles.schema import GraphSpec, InputSpec

NAMES = plugins.names(PACKAGE)
NAME = "uneven-depthwise"


def repeated(outputs, inputs, kinds, kernel=(3, 3), seed=0):
    """A weight in which input channel i has `kinds[i]` distinct kernels up to sign, and zeros among them."""
    rng = np.random.default_rng(seed)
    weight = np.zeros((outputs, inputs, *kernel), np.float32)
    for i, count in enumerate(kinds):
        own = rng.standard_normal((count, *kernel)).astype(np.float32)
        which = np.concatenate([np.arange(count), rng.integers(0, max(count, 1), outputs - count)]) if count else []
        signs = np.concatenate([np.ones(count), rng.choice([-1, 0, 1], outputs - count)]).astype(np.float32)
        for o, k in enumerate(which):
            weight[o, i] = signs[o] * own[k]
    return weight


def conv(weight, x, y, bias=True, **attributes):
    """One convolution `/a` in front of a Relu."""
    arrays = {"w": weight} | ({"b": (len(weight),)} if bias else {})
    inputs = " ".join(["x", *arrays])
    return graph([node("Conv", inputs, "h", "/a", **attributes), node("Relu", "h", "y", "/r")], x, y, arrays)


# --- the contract ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Exported networks, and one whose convolutions repeat their kernels."""
    folder = tmp_path_factory.mktemp("exports")
    found = [conv(repeated(16, 8, [1, 2] * 4), [1, 8, 6, 6], [1, 16, 6, 6], pads=[1] * 4)]
    for net in (ResNet(), Mobile(), Mixed()):
        captured = capture(shaken(net), (torch.randn(1, 3, 16, 16),)).graph
        path = export(captured, [InputSpec(shape=(1, 3, 16, 16))], folder / f"{type(net).__name__}.onnx")
        found.append(optimize_model(onnx.load(str(path)), GraphSpec().passes)[0])
    return found


def test_no_candidate_is_asked_for_by_default():
    assert GraphSpec().candidates == ()


@pytest.mark.parametrize("name", NAMES)
def test_a_candidate_says_what_it_is_for_and_offering_changes_nothing(name, models):
    assert plugins.summary(PACKAGE, name)
    for model in models:
        before = imported(model)
        offers = plugins.load(PACKAGE, name).offers(before)
        assert isinstance(offers, Offers)
        assert set(offers.nodes) <= {n.name for n in before.nodes}
        assert not set(offers.nodes) & {refusal.node for refusal in offers.refused}
        assert [(n.name, n.op) for n in before.nodes] == [(n.name, n.op) for n in imported(model).nodes]


@pytest.mark.parametrize("name", NAMES)
def test_every_offer_keeps_numbers_ports_and_all_other_nodes(name, models):
    count = 0
    for model in models:
        for rewrote, result in offered(model, name)[0].items():
            check_model(result)
            assert compare_outputs(model, result, seeded_inputs(model, 7)).max_rel < 1e-5
            assert [i.name for i in result.graph.input] == [i.name for i in model.graph.input]
            assert [o.name for o in result.graph.output] == [o.name for o in model.graph.output]
            names = [n.name for n in result.graph.node]
            assert rewrote not in names
            assert {n.name for n in model.graph.node} - {rewrote} <= set(names)
            count += 1
    assert count, "the samples hold something for every candidate"


# --- uneven depthwise separation -------------------------------------------------------------------------------------


def test_kernels_are_the_same_if_equal_or_exact_negatives_and_zeros_are_none():
    k = np.arange(1, 10, dtype=np.float32).reshape(3, 3)
    weight = np.stack([np.stack(row) for row in [[k, 0 * k], [-k, -0.0 * k], [k, 2 * k], [k + 1e-6, k]]])
    parts = separate(weight)
    assert parts.sources.tolist() == [0, 0, 1, 1] and parts.kernels.shape == (4, 1, 3, 3)
    assert set(np.unique(parts.sums)) == {-1, 0, 1} and np.count_nonzero(parts.sums) == 6
    again = np.zeros_like(weight)
    for column, source in enumerate(parts.sources):
        again[:, source] += parts.sums[:, column, None, None] * parts.kernels[column]
    np.testing.assert_array_equal(again, weight)


def test_an_uneven_number_of_kernels_is_gathered_convolved_once_each_and_added_up():
    model = conv(repeated(16, 4, [1, 3, 0, 2]), [1, 4, 9, 9], [1, 16, 5, 5], pads=[1] * 4, strides=[2, 2])
    result = rewritten(model, [(NAME, "/a")])
    assert ops(result) == ["Gather", "Conv", "Conv", "Relu"]
    kept = weights(result)
    assert kept["/a/sources"].tolist() == [0, 1, 1, 1, 3, 3]
    assert kept["/a/kernels"].shape == (6, 1, 3, 3) and kept["/a/sums"].shape == (16, 6, 1, 1)
    assert "w" not in kept and "w" in absorbed(result) and "b" in kept


def test_one_kernel_a_channel_needs_no_gathering():
    model = conv(repeated(16, 8, [1] * 8), [1, 8, 6, 6], [1, 16, 6, 6], bias=False, pads=[1] * 4)
    assert ops(rewritten(model, [(NAME, "/a")])) == ["Conv", "Conv", "Relu"]


@pytest.mark.parametrize(
    ("x", "y", "kernel", "attributes"),
    [
        ([1, 8, 12, 12], [1, 16, 8, 8], (3, 3), {"dilations": [2, 2]}),
        ([2, 8, 10, 11], [2, 16, 10, 11], (3, 5), {"auto_pad": "SAME_UPPER"}),
        ([1, 8, 20], [1, 16, 9], (4,), {"strides": [2]}),
    ],
    ids=["dilated", "automatic padding, oblong", "one dimension"],
)
def test_strides_pads_dilations_and_dimensions_are_kept(x, y, kernel, attributes):
    model = conv(repeated(16, 8, [1, 2] * 4, kernel), x, y, **attributes)
    result = rewritten(model, [(NAME, "/a")])
    assert compare_outputs(model, result, seeded_inputs(model, 3)).max_rel < 1e-6


@pytest.mark.parametrize(
    ("weight", "attributes", "reason"),
    [
        (repeated(16, 8, [16] * 8), {},
         "128 of 128 kernels are distinct: 3200 multiply-accumulates a pixel would take the place of 1152"),
        (repeated(16, 8, [1] * 8, (1, 1)), {}, "its kernels are single numbers"),
        (repeated(16, 4, [1] * 4), {"group": 2}, "it is grouped already"),
        (np.zeros((16, 8, 3, 3), np.float32), {}, "its weight is zero"),
    ],
    ids=["distinct", "1x1", "grouped", "zero"],
)  # fmt: skip
def test_a_convolution_that_cannot_win_is_refused_with_the_reason(weight, attributes, reason):
    size = 6 - weight.shape[2] + 1
    models, refused = offered(conv(weight, [1, 8, 6, 6], [1, 16, size, size], **attributes), NAME)
    assert models == {} and [(each.node, each.reason) for each in refused] == [("/a", reason)]


def test_a_weight_that_is_computed_and_a_node_without_a_name_are_refused():
    weight = repeated(16, 8, [1] * 8)
    nodes = [node("Neg", "w", "v", "/n"), node("Conv", "x v", "y", "/a")]
    _, refused = offered(graph(nodes, [1, 8, 6, 6], [1, 16, 4, 4], {"w": weight}), NAME)
    assert [each.reason for each in refused] == ["its weight is not an initializer of float32"]
    nodes = [onnx.helper.make_node("Conv", ["x", "w"], ["y"])]
    _, refused = offered(graph(nodes, [1, 8, 6, 6], [1, 16, 4, 4], {"w": weight}), NAME)
    assert [each.reason for each in refused] == ["it has no name"]


# --- what the device is asked, and what is taken ---------------------------------------------------------------------


def two():
    """Two convolutions that both repeat their kernels."""
    nodes = [node("Conv", "x w", "h", "/a"), node("Relu", "h", "r", "/r"), node("Conv", "r v", "y", "/b")]
    arrays = {"w": repeated(16, 8, [1] * 8), "v": repeated(16, 16, [1] * 16)}
    return graph(nodes, [1, 8, 6, 6], [1, 16, 2, 2], arrays)


def timed(times):
    """A device that finds these (ratio, upper bound) by the rewritten nodes."""

    def measure(models):
        found = []
        for model in models:
            left = {n.name for n in model.graph.node}
            ratio, high = times["".join(name for name in ("a", "b") if f"/{name}" not in left)]
            found.append(Timing(1.0, ratio, ratio, 2 * ratio - high, high))
        return found

    return measure


@pytest.mark.parametrize(
    ("times", "taken"),
    [
        ({"a": (0.9, 0.95), "b": (0.8, 0.85), "ab": (0.7, 0.75)}, "ab"),
        ({"a": (0.9, 0.95), "b": (0.8, 0.85), "ab": (0.82, 0.9)}, "b"),
        ({"a": (0.9, 0.95), "b": (0.8, 0.85), "ab": (0.7, 1.0)}, "b"),
        ({"a": (0.9, 0.95), "b": (0.98, 1.01)}, "a"),
        ({"a": (0.9, 1.0), "b": (1.1, 1.2)}, ""),
        ({"a": (0.5, float("inf")), "b": (1.1, 1.2)}, ""),
    ],
)
def test_only_what_is_shown_to_be_faster_is_taken_together_if_that_is_best(times, taken):
    model = two()
    choice = choose(model, [NAME], timed(times))
    assert sorted(node for each in choice.tried if each.taken for _, node in each.edits) == [f"/{n}" for n in taken]
    assert len(choice.tried) == len(times)
    left = {n.name for n in choice.model.graph.node} & {"/a", "/b"}
    assert left == {"/a", "/b"} - {f"/{name}" for name in taken}
    assert compare_outputs(model, choice.model, seeded_inputs(model, 4)).max_rel < 1e-5
    table = choice.to_table()
    assert sum(row["taken"] for row in table["tried"]) == bool(taken)
    assert all(row["high"] is None or np.isfinite(row["high"]) for row in table["tried"])


def test_hashed_weights_are_those_of_the_rewritten_node_alone():
    rng = np.random.default_rng(5)
    model = two()
    for tensor in model.graph.initializer:
        near = weights(model)[tensor.name] + 1e-4 * rng.standard_normal(tensor.dims).astype(np.float32)
        tensor.CopyFrom(onnx.numpy_helper.from_array(near.astype(np.float32), tensor.name))
    assert offered(model, NAME)[0] == {}

    def hashed(values):
        return np.round(values, 2)

    choice = choose(model, [NAME], timed({"a": (0.9, 0.95), "b": (1.0, 1.1)}), hashed)
    assert [each.edits for each in choice.tried if each.taken] == [((NAME, "/a"),)]
    kept = weights(choice.model)
    np.testing.assert_array_equal(kept["v"], weights(model)["v"])
    np.testing.assert_array_equal(kept["/a/kernels"], np.round(kept["/a/kernels"], 2))
    gap = compare_outputs(model, choice.model, seeded_inputs(model, 8))
    assert 1e-4 < gap.max_rel < 0.2 and gap.cosine > 0.99


def test_a_network_without_an_offer_is_not_measured():
    def measure(models):
        raise AssertionError("the device was asked for nothing")

    model = conv(repeated(16, 8, [16] * 8), [1, 8, 6, 6], [1, 16, 4, 4])
    choice = choose(model, [NAME], measure)
    assert choice.model is model and choice.tried == () and len(choice.refused[NAME]) == 1


def test_a_rewrite_that_changes_the_numbers_is_never_measured(monkeypatch):
    def wrong(graph, name, node):
        plugins.load(PACKAGE, name).rewrite(graph, node)
        sums = graph.tensors()[f"{node}/sums"]
        sums.values = 1.01 * sums.values
        return PassResult(1)

    monkeypatch.setattr(rewriting, "_rewrite", wrong)
    models, refused = offered(two(), NAME)
    assert models == {} and len(refused) == 2
    assert refused[0].reason.startswith("the rewrite failed its proof: outputs differ by 0.01 of their largest value")
    with pytest.raises(DeployError, match="outputs differ"):
        rewritten(two(), [(NAME, "/a")])


def test_an_unknown_candidate_is_named():
    with pytest.raises(UsageError) as caught:
        choose(two(), ["uneven-depthwize"], timed({}))
    assert caught.value.message == "no candidate named 'uneven-depthwize'. Did you mean 'uneven-depthwise'?"
    assert caught.value.hint == "deploy list candidates"
