"""Bundles: what is written, and that nothing which was changed, added or smuggled in passes for whole."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pipeline import cli, outcome
from pipeline.cache import file_hash
from pipeline.graph.precision.half import halve
from pipeline.graph.verify import seeded_inputs
from pipeline.nightly.baseline import from_run
from pipeline.nouns import DropBlock, KeepUnits, PruningPlan
from pipeline.release.bundle import Contents, licence_texts, write_bundle
from pipeline.release.encoders import raw
from pipeline.release.encoders.base import load_encoder
from pipeline.release.manifest import Accuracy, TensorSpec, latency_of
from pipeline.release.verify import measure_again, read_manifest, verify
from profiles import plugins
from profiles.errors import DeployError, UsageError
from profiles.schema import Budget, MeasureSpec, load_profile
from targets.base import Target, load_target
from targets.harness.measurement import Session

SHORT = MeasureSpec(
    accept_processes=2, accept_rounds=3, warmup_s=0.02, warmup_inferences=2, warmup_max_s=0.1, steady=0.9,
    block_dropped=1, block_timed=4, block_min_ms=0,
)  # fmt: skip


def network(width: int) -> onnx.ModelProto:
    """conv 3 -> width, relu, mean over the image, linear to 4 classes."""
    rng = np.random.default_rng(width)
    weights = {
        "conv.weight": rng.normal(size=(width, 3, 3, 3)).astype(np.float32),
        "fc.weight": rng.normal(size=(4, width)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["input", "conv.weight"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("GlobalAveragePool", ["r"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "fc.weight"], ["logits"], transB=1),
    ]
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3, 16, 16])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 4])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Target:
    profile = load_profile("local", {"measure": SHORT.model_dump()})
    return load_target(profile, tmp_path_factory.mktemp("state"))


def undisturbed(session: Session) -> Session:
    """The session as if every process had given the first one's samples, and nothing had disturbed it.

    Two processes on a busy machine can lie so far apart that the bounds of their ratio reach beyond any budget.
    """
    calm = {}
    for name, measured in session.measurements.items():
        first = measured.processes[0]
        free = replace(first, flagged=np.zeros_like(first.flagged), quota_stops=np.zeros_like(first.quota_stops))
        calm[name] = replace(measured, processes=(free,) * len(measured.processes))
    return replace(session, measurements=calm, telemetry={})


@pytest.fixture(scope="module")
def contents(tmp_path_factory: pytest.TempPathFactory, device: Target) -> Contents:
    """A real network, measured for real, if briefly.

    How far processes differ and what disturbed them is judged elsewhere; what is asked here is what a bundle says.
    """
    folder = tmp_path_factory.mktemp("nets")
    for name, width in (("dense", 64), ("pruned", 16)):
        onnx.save(network(width), folder / f"{name}.onnx")
    both = {name: folder / f"{name}.onnx" for name in ("pruned", "dense")}
    session = undisturbed(device.measure(both, SHORT, "accept"))
    given = np.random.default_rng(0).normal(size=(1, 3, 16, 16)).astype(np.float32)
    weights = {t.name: numpy_helper.to_array(t) for t in network(16).graph.initializer}
    return Contents(
        network="nets:tiny",
        target="local",
        model=folder / "pruned.onnx",
        dense=folder / "dense.onnx",
        plan=PruningPlan((KeepUnits("g1", tuple(range(16))), DropBlock("b2"))),
        weights=weights,
        session=session,
        passes=[{"pass": "dead-ends", "changed": 1, "refused": []}],
        report="<!doctype html><title>report</title>",
        sample_inputs={"input": given},
        sample_outputs={"logits": device.infer(folder / "pruned.onnx", [given])[0]},
        inputs=(TensorSpec(name="input", dtype="float32", shape=(1, 3, 16, 16), layout="NCHW", normalisation="none"),),
        outputs=(TensorSpec(name="logits", dtype="float32", shape=(1, 4), layout="NC"),),
        latency=latency_of(session, Budget.parse("1000x"), "pruned", "dense"),
        accuracy=Accuracy(metric="accuracy", dense=0.98, pruned=0.975, max_drop=0.01),
        versions={"edge-deploy": "0.1.0"},
        sources={"weights": hashlib.sha256(b"weights").hexdigest()},
        chain=[{"stage": "export", "key": hashlib.sha256(b"key").hexdigest(), "outputs": {}}],
        licences={"LICENSE": "free to use"},
    )  # fmt: skip


@pytest.fixture
def bundle(tmp_path: Path, contents: Contents) -> Path:
    return write_bundle(tmp_path / "run" / "bundle", contents)


def test_a_bundle_holds_all_that_it_promises_and_verifies(bundle: Path, device: Target):
    assert sorted(path.name for path in bundle.iterdir()) == [
        "LICENSES.txt", "dense.onnx", "manifest.json", "measurement.json", "model.onnx", "passes.json", "plan.json",
        "pruned.safetensors", "report.html", "sample.safetensors",
    ]  # fmt: skip
    assert verify(bundle, device.infer) == []
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


def test_the_manifest_tells_where_everything_came_from(bundle: Path, contents: Contents):
    manifest = read_manifest(bundle)
    assert manifest.files["model.onnx"].sha256 == hashlib.sha256(contents.model.read_bytes()).hexdigest()
    assert manifest.device_sha256 == contents.session.fingerprint.digest()
    assert manifest.inputs[0].layout == "NCHW" and manifest.inputs[0].normalisation == "none"
    assert manifest.chain[0].stage == "export" and manifest.runtime.startswith("onnxruntime")
    assert manifest.latency == contents.latency and manifest.accuracy == contents.accuracy


def test_the_same_contents_give_the_same_bytes(tmp_path: Path, contents: Contents):
    one, two = write_bundle(tmp_path / "one", contents), write_bundle(tmp_path / "two", contents)
    assert {p.name: p.read_bytes() for p in one.iterdir()} == {p.name: p.read_bytes() for p in two.iterdir()}


def test_raw_samples_plan_and_weights_come_back_as_they_were(bundle: Path, contents: Contents):
    session = Session.from_json((bundle / "measurement.json").read_text())
    assert np.array_equal(session.measurement("pruned").pooled_ns, contents.session.measurement("pruned").pooled_ns)
    assert PruningPlan.from_json((bundle / "plan.json").read_text()) == contents.plan
    weights = raw.decode((bundle / "pruned.safetensors").read_bytes())
    assert all(np.array_equal(weights[name], array) for name, array in contents.weights.items())


def test_writing_again_replaces_the_bundle_at_once(bundle: Path, contents: Contents, device: Target):
    (bundle / "stray").write_text("old")
    write_bundle(bundle, contents)
    assert verify(bundle, device.infer) == [] and [path.name for path in bundle.parent.iterdir()] == ["bundle"]


def test_a_bundle_that_cannot_be_written_leaves_nothing(tmp_path: Path, contents: Contents):
    with pytest.raises(FileNotFoundError):
        write_bundle(tmp_path / "bundle", replace(contents, model=tmp_path / "gone.onnx"))
    with pytest.raises(UsageError, match=r"'\.\./engine' cannot be a file of a bundle."):
        write_bundle(tmp_path / "bundle", replace(contents, artifacts={"../engine": contents.model}))
    assert list(tmp_path.iterdir()) == []


def test_an_engine_of_the_runtime_is_listed_and_checked(tmp_path: Path, contents: Contents, device: Target):
    bundle = write_bundle(tmp_path / "bundle", replace(contents, artifacts={"model.engine": contents.dense}))
    assert "model.engine" in read_manifest(bundle).files and verify(bundle, device.infer) == []


@pytest.fixture
def engines(tmp_path: Path, contents: Contents) -> Contents:
    """The same as it is where a runtime builds engines: these were measured, and lie beside their networks."""
    made = {"pruned": tmp_path / "model.plan", "dense": tmp_path / "dense.plan"}
    for name, path in made.items():
        path.write_bytes(b"engine of " + name.encode())
    measured = {
        name: replace(taken, sha256=file_hash(made[name])) if name in made else taken
        for name, taken in contents.session.measurements.items()
    }
    session = replace(contents.session, measurements=measured)
    return replace(contents, session=session, artifacts={path.name: path for path in made.values()})


def test_what_was_measured_may_be_an_engine_beside_its_network(tmp_path: Path, engines: Contents, device: Target):
    assert verify(write_bundle(tmp_path / "bundle", engines), device.infer) == []
    bare = write_bundle(tmp_path / "bare", replace(engines, artifacts={}))
    gone = [f"'{name}' was measured from a file that is not in the bundle." for name in ("pruned", "dense")]
    assert verify(bare, device.infer) == gone
    swapped = {"model.plan": engines.artifacts["dense.plan"], "dense.plan": engines.artifacts["model.plan"]}
    assert verify(write_bundle(tmp_path / "swapped", replace(engines, artifacts=swapped)), device.infer) == gone


def test_a_build_ships_the_engines_that_it_measured_and_no_others(tmp_path: Path, engines: Contents):
    done = {stem: SimpleNamespace(path=lambda _, stem=stem: Path(f"{stem}.onnx")) for stem in ("model", "dense")}
    ending: Any = SimpleNamespace(final=done["model"], dense=done["dense"], session=engines.session)
    built = {Path(name).stem: path.read_bytes() for name, path in engines.artifacts.items()}

    def build_each(models: dict[Path, Path]) -> None:
        for onnx_file, place in models.items():
            place.write_bytes(built[onnx_file.stem])

    def work(runtime: str) -> Any:
        run, target = SimpleNamespace(folder=lambda name: tmp_path), SimpleNamespace(build_each=build_each)
        return SimpleNamespace(profile=SimpleNamespace(runtime=runtime), run=run, target=target)

    shipped = outcome._engines(work("tensorrt"), ending)
    assert {name: path.read_bytes() for name, path in shipped.items()} == {
        "model.plan": b"engine of pruned", "dense.plan": b"engine of dense",
    }  # fmt: skip
    assert outcome._engines(work("ort"), ending) == {}
    built["model"] = b"another build"
    with pytest.raises(DeployError, match=r"the engine of 'pruned' that was measured is gone"):
        outcome._engines(work("tensorrt"), ending)


def test_licences_beside_the_project_go_into_the_bundle(tmp_path: Path, contents: Contents):
    (tmp_path / "LICENSE").write_text("Do what you like.")
    (tmp_path / "NOTICE.txt").write_text("Thanks.")
    texts = licence_texts(tmp_path)
    assert texts == {"LICENSE": "Do what you like.", "NOTICE.txt": "Thanks."}
    written = (write_bundle(tmp_path / "bundle", replace(contents, licences=texts)) / "LICENSES.txt").read_text()
    assert "Do what you like." in written and "Thanks." in written
    bare = (write_bundle(tmp_path / "bare", replace(contents, licences={})) / "LICENSES.txt").read_text()
    assert "No licence file was found" in bare


# --- a bundle that is not what it says -------------------------------------------------------------------------------


def _reseal(bundle: Path, change: Callable[[dict[str, Any]], None] | None = None) -> None:
    """Write a manifest whose checksums agree with the files again: what somebody who means harm would do."""
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    for name in manifest["files"]:
        data = (bundle / name).read_bytes()
        manifest["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    if change:
        change(manifest)
    path.write_text(json.dumps(manifest))


def test_a_changed_byte_is_found(bundle: Path, device: Target):
    data = bytearray((bundle / "model.onnx").read_bytes())
    data[-1] ^= 1
    (bundle / "model.onnx").write_bytes(data)
    [problem] = verify(bundle, device.infer)
    assert problem.startswith("model.onnx was changed: its SHA-256 is ")


def test_missing_extra_and_resized_files_are_all_named(bundle: Path, device: Target):
    (bundle / "plan.json").unlink()
    (bundle / "payload.so").write_bytes(b"\x7fELF")
    (bundle / "passes.json").write_text("[]")
    assert verify(bundle, device.infer) == [
        "plan.json is missing.",
        "payload.so does not belong to the bundle.",
        f"passes.json has 2 bytes, the manifest says {read_manifest(bundle).files['passes.json'].bytes}.",
    ]


def test_a_required_file_cannot_be_left_out_of_the_manifest(bundle: Path, device: Target):
    (bundle / "dense.onnx").unlink()
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["files"]["dense.onnx"]
    path.write_text(json.dumps(manifest))
    assert verify(bundle, device.infer) == ["dense.onnx is not listed in the manifest."]


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", "..", "manifest.json", "a\\b", ""])
def test_a_name_that_leads_out_of_the_bundle_is_refused(bundle: Path, device: Target, name: str):
    def smuggle(manifest: dict[str, Any]) -> None:
        manifest["files"][name] = {"sha256": "0" * 64, "bytes": 1}

    _reseal(bundle, smuggle)
    [problem] = verify(bundle, device.infer)
    assert problem.startswith("manifest.json: files") and f"{name!r} is not the name of a file" in problem


def test_a_link_is_not_followed(bundle: Path, device: Target, tmp_path: Path):
    shutil.move(bundle / "passes.json", tmp_path / "outside.json")
    (bundle / "passes.json").symlink_to(tmp_path / "outside.json")
    assert verify(bundle, device.infer) == ["passes.json is not a plain file."]


def test_a_size_beyond_all_bounds_is_refused_before_it_is_read(bundle: Path, device: Target):
    os.truncate(bundle / "passes.json", 1 << 30)

    def told(manifest: dict[str, Any]) -> None:
        manifest["files"]["passes.json"]["bytes"] = 1 << 30

    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    told(manifest)
    path.write_text(json.dumps(manifest))
    assert verify(bundle, device.infer) == ["passes.json has 1073741824 bytes, more than 536870912."]


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("encoder", "../../evil", "manifest.json: no encoder named '../../evil'. Known: raw."),
        ("surprise", 1, "manifest.json: no key named 'surprise'. "),
        ("device_sha256", "0" * 64, "the samples were taken on another device than the manifest says."),
        ("device_sha256", "zz", "manifest.json: device_sha256 is 'zz', a string; "),
    ],
)  # fmt: skip
def test_a_manifest_that_lies_is_found(bundle: Path, device: Target, key: str, value: Any, problem: str):
    _reseal(bundle, lambda manifest: manifest.update({key: value}))
    [found] = verify(bundle, device.infer)
    assert found.startswith(problem)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("ratio", 0.01, "0.01"), ("ratio_interval", [0.01, 0.02], "0.01 to 0.02"), ("measured_ms", 1e-6, "1e-06"),
        ("dense_ms", 99.0, "99"), ("interval_ms", [0.0, 1e-6], "0 to 1e-06"), ("budget_ms", 99.0, "99"),
        ("budget_ms", None, "None"), ("percentile", "mean", "mean"),
    ],
)  # fmt: skip
def test_a_better_latency_than_the_samples_give_is_found(bundle: Path, device: Target, key: str, value: Any, said: str):
    _reseal(bundle, lambda manifest: manifest["latency"].update({key: value}))
    [problem] = verify(bundle, device.infer)
    assert problem.startswith(f"the raw samples give {key} ") and problem.endswith(f"the manifest says {said}.")


def test_networks_that_changed_places_in_the_samples_are_found(bundle: Path, device: Target):
    """The dense network's samples under the name of the pruned one."""
    session = json.loads((bundle / "measurement.json").read_text())
    swap = {"dense": "pruned", "pruned": "dense"}
    for row in session["measurements"]:
        row["name"] = swap[row["name"]]
    (bundle / "measurement.json").write_text(json.dumps(session))
    _reseal(bundle)
    assert "'pruned' was measured from a file that is not in the bundle." in verify(bundle, device.infer)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda m: m["inputs"][0].update(shape=[1, 3, 99, 99]), "model.onnx has the inputs ['input float32 [1, 3, "),
        (lambda m: m["outputs"][0].update(dtype="int8"), "model.onnx has the outputs ['logits float32 [1, 4]'], "),
        (lambda m: m["device"].update(cpu="another"), "the samples were taken on another device "),
        (lambda m: m.update(runtime="tensorrt 10"), "the samples were taken with another runtime than 'tensorrt 10'."),
        (lambda m: m.update(sample={"rtol": 1.0}), "manifest.json: sample.rtol is 1.0, "),
        (lambda m: m.update(sample={"atol": 1e9}), "the tolerance 1e+09 of the sample is larger than output 'logits'."),
    ],
    ids=["shape", "dtype", "device", "runtime", "rtol", "atol"],
)
def test_what_a_manifest_says_of_the_network_is_held_against_the_files(
    bundle: Path, device: Target, change: Callable[[dict[str, Any]], None], problem: str
):
    _reseal(bundle, change)
    assert verify(bundle, device.infer)[0].startswith(problem)


@pytest.mark.parametrize("text", ["[" * 100_000, "\udcff", "2 ** 80"], ids=["deep", "no text", "large"])
def test_samples_that_cannot_be_read_are_one_sentence(bundle: Path, device: Target, text: str):
    whole = (bundle / "measurement.json").read_text()
    if text == "2 ** 80":
        table = json.loads(whole)
        table["measurements"][0]["processes"][0]["ns"][0][0] = 2**80
        text = json.dumps(table)
    (bundle / "measurement.json").write_text(text, errors="surrogateescape")
    _reseal(bundle)
    [problem] = verify(bundle, device.infer)
    assert problem.startswith("measurement.json: ") and "\n" not in problem
    with pytest.raises(DeployError):
        from_run(bundle)


def test_samples_of_another_network_are_found(bundle: Path, device: Target):
    onnx.save(network(32), bundle / "model.onnx")
    _reseal(bundle)
    assert verify(bundle, device.infer) == ["'pruned' was measured from a file that is not in the bundle."]


def test_files_that_are_not_what_their_names_say_are_found(bundle: Path, device: Target):
    (bundle / "plan.json").write_text('{"version": 1, "edits": [{"edit": "run_code"}]}')
    (bundle / "pruned.safetensors").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    (bundle / "measurement.json").write_text("{}")
    _reseal(bundle)
    problems = verify(bundle, device.infer)
    assert problems[0] == "plan.json is not a plan: unknown edit 'run_code'."
    assert problems[1].startswith("the weights are no safetensors file: ")
    assert problems[2].startswith("measurement.json: ")


def test_a_graph_that_reads_another_file_is_refused(bundle: Path, device: Target, contents: Contents):
    model = network(16)
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../../etc/passwd")
    (bundle / "dense.onnx").write_bytes(model.SerializeToString())
    _reseal(bundle)
    assert "dense.onnx keeps 'conv.weight' in a file outside itself." in verify(bundle, device.infer)


def test_a_file_outside_that_a_subgraph_reads_is_refused_too(bundle: Path, device: Target):
    model = network(16)
    outside = helper.make_tensor("hidden", TensorProto.FLOAT, [1], [0.0])
    outside.ClearField("float_data")
    outside.data_location = TensorProto.EXTERNAL
    constant = helper.make_node("Constant", [], ["y"], value=outside)
    body = helper.make_graph([constant], "body", [], [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])])
    model.graph.node.append(helper.make_node("If", ["cond"], ["z"], then_branch=body, else_branch=body))
    (bundle / "dense.onnx").write_bytes(model.SerializeToString())
    _reseal(bundle)
    assert "dense.onnx keeps 'hidden' in a file outside itself." in verify(bundle, device.infer)


def test_bytes_that_are_no_graph_and_graphs_that_are_invalid_are_told_apart(bundle: Path, device: Target):
    (bundle / "model.onnx").write_bytes(b"\x00\x01 no graph")
    model = network(16)
    model.graph.node[0].op_type = "Convolve"
    (bundle / "dense.onnx").write_bytes(model.SerializeToString())
    _reseal(bundle)
    problems = verify(bundle, device.infer)
    assert any(problem.startswith("model.onnx is not ONNX: ") for problem in problems)
    assert any(problem.startswith("dense.onnx is not valid ONNX: ") for problem in problems)


def test_a_sample_that_is_not_reproduced_is_found(bundle: Path, device: Target, contents: Contents):
    from safetensors.numpy import save

    wrong = {"input.input": contents.sample_inputs["input"], "output.logits": contents.sample_outputs["logits"] + 1}
    (bundle / "sample.safetensors").write_bytes(save(wrong))
    _reseal(bundle)
    assert verify(bundle, device.infer) == ["output 'logits' of the sample differs by up to 1 from the recorded one."]
    (bundle / "sample.safetensors").write_bytes(save({"input.input": contents.sample_inputs["input"]}))
    _reseal(bundle)
    assert verify(bundle, device.infer) == ["sample.safetensors has no tensor 'output.logits'."]


def test_a_folder_that_is_no_bundle_says_what_is_missing(tmp_path: Path, device: Target):
    assert verify(tmp_path, device.infer) == ["manifest.json is missing."]
    (tmp_path / "manifest.json").write_text("[" * 100_000)
    assert verify(tmp_path, device.infer)[0].startswith("manifest.json is not JSON: ")
    with pytest.raises(UsageError) as caught:
        verify(tmp_path / "gone", device.infer)
    assert caught.value.message == f"there is no bundle in '{tmp_path / 'gone'}'."


def test_a_bundle_is_measured_again_and_its_budget_judged_anew(bundle: Path, device: Target, tmp_path: Path):
    judged, session = measure_again(bundle, device, tmp_path / "work")
    assert judged.limit == 1000 and judged.unit == "x" and judged.verdict in ("met", "undecided")
    assert set(session.measurements) == {"pruned", "dense"}
    shutil.rmtree(bundle)
    bundle.mkdir()
    with pytest.raises(DeployError, match=r"manifest.json is missing."):
        measure_again(bundle, device, tmp_path / "work")


def test_the_command_verifies_and_its_exit_code_tells(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    def run(*arguments: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as done:
            cli.main(["verify", str(bundle), *arguments])
        return int(done.value.code or 0), capsys.readouterr().out

    monkeypatch.chdir(tmp_path)
    code, out = run()
    whole, verdict = out.splitlines()
    assert code == 0 and whole == f"{bundle} is whole: checksums, schema, graphs and the sample's output agree."
    assert verdict.startswith("met: p50 is 0.") and verdict.endswith("budget 1000x")
    keys = SHORT.model_dump(exclude_unset=True).items()
    code, out = run("--target", "local", "--json", *(f"--set=measure.{key}={value}" for key, value in keys))
    told = json.loads(out)
    assert code == {"met": 0, "undecided": 4}[told["verdict"]] and "budget 1000x" in told["reason"]
    _reseal(bundle, lambda manifest: manifest["accuracy"].update(pruned=0.5))
    code, out = run("--json")
    assert code == 3 and json.loads(out)["verdict"] == "accuracy missed" and json.loads(out)["problems"] == []
    slow = latency_of(Session.from_json((bundle / "measurement.json").read_text()), Budget.parse("0.001x"),
                      "pruned", "dense")  # fmt: skip
    _reseal(bundle, lambda manifest: manifest.update(latency=slow.model_dump(mode="json")))
    code, out = run()
    assert code == 3 and out.splitlines()[-1].startswith("missed: ")
    (bundle / "plan.json").unlink()
    assert run() == (1, "plan.json is missing.\n")
    told = json.loads(run("--json")[1])
    assert told == {"bundle": str(bundle), "problems": ["plan.json is missing."], "exit_code": 1}


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory, contents: Contents, device: Target) -> Contents:
    """The same in half precision; the file that was measured lies beside it."""
    folder, model = tmp_path_factory.mktemp("half"), onnx.load(contents.model)
    onnx.save(halve(model, seeded_inputs(model))[0], folder / "half.onnx")
    given = list(contents.sample_inputs.values())
    return replace(
        contents, model=folder / "half.onnx", artifacts={"exact.onnx": contents.model}, precision="fp16",
        sample_outputs={"logits": device.infer(folder / "half.onnx", given)[0]},
    )  # fmt: skip


def test_the_manifest_tells_the_precision_and_it_is_checked_on_the_graph(
    tmp_path: Path, contents: Contents, half: Contents, device: Target
):
    whole, told = write_bundle(tmp_path / "half", half), read_manifest(tmp_path / "half").precision
    assert told == "fp16" and verify(whole, device.infer) == []
    exact = replace(contents, precision="fp16")
    assert verify(write_bundle(tmp_path / "lie", exact), device.infer) == [
        "model.onnx computes nothing in float16, the manifest says fp16."
    ]
    assert verify(write_bundle(tmp_path / "lie", replace(half, precision="fp32")), device.infer) == [
        "model.onnx holds 2 weights in float16, 'conv.weight' first; the manifest says fp32."
    ]
    _reseal(whole, lambda manifest: manifest.update(precision="fp8"))
    [problem] = verify(whole, device.infer)
    assert problem.startswith("manifest.json: precision is 'fp8', a string; ")


def test_a_bundle_of_a_version_that_told_no_precision_is_whole(bundle: Path, device: Target):
    _reseal(bundle, lambda manifest: manifest.pop("precision"))
    assert read_manifest(bundle).precision is None and verify(bundle, device.infer) == []


@pytest.mark.parametrize("name", plugins.names("pipeline.release.encoders"))
def test_every_encoder_gives_back_what_it_was_given(name: str):
    encoder = load_encoder(name)
    tensors = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.array(3, dtype=np.int64)}
    data = encoder.encode(tensors)
    assert data == encoder.encode(dict(reversed(tensors.items())))
    back = encoder.decode(data)
    assert set(back) == {"a", "b"} and back["a"] == 3 and np.allclose(back["b"], tensors["b"], rtol=1e-2)
    with pytest.raises(DeployError):
        encoder.decode(b"\x80\x04\x95 not weights")
