"""The simulated device: a known truth that measuring must find."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from profiles.errors import DeployError
from profiles.schema import Budget, load_profile
from targets.base import load_target
from targets.harness.measurement import verdict
from targets.simulated import Simulated, Truth


@pytest.fixture
def target(simulated, tmp_path):
    return load_target(simulated, tmp_path)


def test_time_climbs_a_staircase_of_the_grid(target, conv):
    times = {c: target.true_ms(conv("net", channels=c)) for c in (9, 12, 16, 17, 24)}
    assert times[9] == pytest.approx(times[12], rel=1e-3) and times[12] == pytest.approx(times[16], rel=1e-3)
    assert times[17] > 1.2 * times[16]
    assert times[24] == pytest.approx(times[17], rel=1e-3)


def test_the_profile_sets_the_true_grid(conv, tmp_path):
    wide = load_target(load_profile("simulated", {"prune": {"grid": 32}}), tmp_path)
    assert wide.true_ms(conv("net", channels=8)) == pytest.approx(wide.true_ms(conv("net", channels=32)), rel=1e-2)


def test_measured_ratios_hold_the_true_ratio(target, conv):
    spec = target.profile.measure
    inside = 0
    for layers in (1, 2, 3, 4, 6):
        cut, dense = conv("cut", layers=layers), conv("dense", layers=8)
        interval = target.measure({"cut": cut, "dense": dense}, spec, "accept").ratio("cut", "dense")
        truth = target.true_ms(cut) / target.true_ms(dense)
        assert interval.center == pytest.approx(truth, rel=0.01)
        inside += interval.low <= truth <= interval.high
    assert inside >= 4


def test_a_budget_is_judged_against_the_truth(target, conv):
    cut, dense = conv("cut", layers=3), conv("dense", layers=8)
    truth = target.true_ms(cut) / target.true_ms(dense)
    session = target.measure({"cut": cut, "dense": dense}, target.profile.measure, "accept")
    assert verdict(session, "cut", "dense", Budget(ratio=truth * 1.03)) == "met"
    assert verdict(session, "cut", "dense", Budget(ratio=truth * 0.97)) == "missed"


def test_rows_scatter_about_the_truth(target, conv):
    models = [conv(f"row{i}", layers=1 + i) for i in range(6)]
    reference = conv("dense", layers=8)
    times = target.rows(models, reference, 12)
    ratios = np.median(times.ms / times.reference_ms, axis=1)
    truth = np.array([target.true_ms(m) for m in models]) / target.true_ms(reference)
    np.testing.assert_allclose(ratios, truth, rtol=0.02)


def test_equal_seeds_draw_equal_samples_and_another_seed_draws_others(target, conv):
    net, spec = {"a": conv("net")}, target.profile.measure
    first, again = (target.measure(net, spec, "rank").measurement("a").pooled_ns for _ in range(2))
    other = target.measure(net, spec.model_copy(update={"seed": 1}), "rank").measurement("a").pooled_ns
    assert (first == again).all() and not (first == other).all()


def test_everything_says_that_it_is_simulated(target, conv):
    session = target.measure({"a": conv("net")}, target.profile.measure, "rank")
    assert session.simulated and target.fingerprint().simulated
    assert session.protocol.startswith("simulated ") and session.measurement("a").runtime == "simulated 1"
    assert session.lease_owner == "nobody, simulated"


def test_layers_are_the_roofline_of_every_node(target, conv):
    net = conv("net", layers=3)
    (layers,) = target.layers({"net": net}, target.profile.measure).values()
    assert [layer.op for layer in layers] == ["Conv", "Relu"] * 3 + ["GlobalAveragePool", "Flatten"]
    assert sum(layer.ms for layer in layers) == pytest.approx(target.true_ms(net) - target.truth.call_us * 1e-3)
    assert layers[2].ms > layers[0].ms


def test_half_precision_moves_half_the_bytes_and_computes_as_fast(target, conv):
    exact, half = conv("exact", layers=1), conv("half", layers=1)
    model = onnx.load(half)
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    onnx.save(model, half)
    layers = target.layers({"exact": exact, "half": half}, target.profile.measure)
    overhead = 1e-3 * target.truth.node_us
    before, after = ({layer.op: layer.ms - overhead for layer in layers[name]} for name in ("exact", "half"))
    assert after["Conv"] == pytest.approx(before["Conv"]), "bound by its multiplications"
    assert after["Relu"] == pytest.approx(before["Relu"] / 2)


def test_a_paced_session_misses_what_is_slower_than_the_period(target, conv):
    cut, dense = conv("cut", layers=1), conv("dense", layers=8)
    period = 0.5 * (target.true_ms(cut) + target.true_ms(dense))
    spec = target.profile.measure.model_copy(update={"paced_ms": period})
    session = target.measure({"cut": cut, "dense": dense}, spec, "accept")
    assert session.measurement("cut").miss_ratio == pytest.approx(0.0, abs=0.02)
    assert session.measurement("dense").miss_ratio == pytest.approx(1.0, abs=0.02)
    assert f"paced={period:g}ms" in session.protocol


def test_a_sustained_session_lasts_its_time_in_the_first_process(target, conv):
    spec = target.profile.measure.model_copy(update={"sustained_s": 70.0, "paced_ms": 33.0})
    process, *short = target.measure({"a": conv("net")}, spec, "accept").measurement("a").processes
    assert {len(each.ns) for each in short} == {spec.accept_rounds}
    assert (process.started_ns[-1] - process.started_ns[0]) * 1e-9 == pytest.approx(70.0, abs=1.0)
    assert len(process.ns) == pytest.approx(70.0 / (0.033 * (4 + process.ns.shape[1])), abs=1.0)


def test_a_sustained_session_of_a_device_that_keeps_cool_shows_little_drift(simulated, conv, tmp_path):
    calm = Simulated(simulated, tmp_path, Truth(drift=0.0001))
    spec = calm.profile.measure.model_copy(update={"sustained_s": 90.0, "paced_ms": 10.0})
    assert calm.measure({"a": conv("net")}, spec, "accept").measurement("a").drift == pytest.approx(1.0, abs=0.01)


def test_another_truth_is_another_device(simulated, tmp_path):
    one, two = Simulated(simulated, tmp_path), Simulated(simulated, tmp_path, Truth(grid=16))
    assert one.fingerprint().digest() != two.fingerprint().digest()


def test_a_file_that_is_no_onnx_is_named(target, tmp_path):
    (tmp_path / "broken.onnx").write_bytes(b"this is no network" * 4)
    with pytest.raises(DeployError, match=r"broken.onnx' is not an ONNX file with known shapes: "):
        target.measure({"a": tmp_path / "broken.onnx"}, target.profile.measure, "rank")
