"""The benchmarks' networks and, where the real data are, their accuracy."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from benchmarks.frontier import noise
from pipeline.project import load_project, predict_torch
from pipeline.project.schema import read_project_file
from profiles.errors import UsageError

pytestmark = pytest.mark.usefixtures("leave_no_project_behind")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PROJECTS = sorted(path.parent.name for path in (BENCHMARKS / "projects").glob("*/deploy.toml"))
TRAINED_HERE = ["inception_gtsrb", "mobilenetv2_gtsrb"]
"""Projects whose weights benchmarks/frontier trains."""


def module(name: str):
    """A file of benchmarks/ as a module of its own name, so that it hides nothing."""
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", BENCHMARKS / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


nets, data, builds = module("nets"), module("data"), module("builds")


def needs(folder: str):
    reason = data.missing(folder)
    return [pytest.mark.data, pytest.mark.skipif(reason is not None, reason=str(reason))]


@pytest.mark.parametrize(
    ("build", "size", "classes", "weights"),
    [
        (nets.resnet20, 32, 43, 271_867),
        (nets.resnet56, 32, 10, 853_018),
        (nets.mobilenetv1, 96, 2, 216_322),
        (nets.shufflenet, 32, 43, 193_195),
        (nets.efficientnet, 32, 43, 373_891),
        (nets.mobilenetv2, 96, 43, 975_595),
        (nets.resnet50, 224, 1000, 25_557_032),
        (nets.mobilenetv2_signs, 32, 43, 423_275),
        (nets.inception_signs, 32, 43, 156_571),
    ],
)
def test_a_network_has_its_shape_and_its_size(build, size, classes, weights):
    network = build().eval()
    assert sum(p.numel() for p in network.parameters()) == weights
    with torch.inference_mode():
        out = network(torch.randn(2, 3, size, size))
    assert out.shape == (2, classes)
    assert torch.isfinite(out).all()


def test_networks_of_random_weights_are_the_same_every_time_and_react_to_their_input():
    one, two = nets.efficientnet(), nets.efficientnet()
    images = torch.randn(4, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(one(images), two(images))
        assert float(one(images).std(0).mean()) > 0.01


def test_a_copy_of_a_project_finds_what_the_project_finds_and_accepts_any_accuracy(tmp_path):
    copied = read_project_file(builds.accepting("mobilenetv2_gtsrb", tmp_path / "copied"))
    assert copied.accuracy.max_drop == 1.0 and copied.recover.epochs == 1
    assert [Path(folder) for folder in copied.path] == [BENCHMARKS, BENCHMARKS / "projects" / "resnet20_gtsrb"]
    assert f":-{BENCHMARKS}/trained}}/mobilenetv2_gtsrb.safetensors" in copied.model.weights
    assert (builds.accepting("resnet20_gtsrb", tmp_path / "other") / "task.py").is_file()


def test_a_shuffle_interleaves_the_two_halves():
    x = torch.arange(6.0).view(1, 6, 1, 1)
    assert nets.shuffle(x).flatten().tolist() == [0, 3, 1, 4, 2, 5]


def test_an_epoch_moves_images_within_their_bounds_and_mirrors_only_when_told():
    images = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 3), dtype=np.uint8)
    labels = np.arange(64)

    def moves(mirror):
        epoch = data.Epoch(images, labels, (0, 0), lambda x: x, batch=32, move=1, mirror=mirror)
        assert len(epoch) == 2
        for moved, chosen in epoch:
            for image, label in zip(moved, chosen, strict=True):
                middle, original = image[1:-1, 1:-1], images[label]
                shifts = [original[1 + y : 7 + y, 1 + x : 7 + x] for y in (-1, 0, 1) for x in (-1, 0, 1)]
                yield any(np.array_equal(middle, shift) for shift in shifts)

    assert all(moves(mirror=False))
    assert 16 < sum(moves(mirror=True)) < 48


def test_agreement_is_one_for_equal_outputs_and_zero_for_their_mean():
    dense = np.random.default_rng(0).random((50, 4), np.float32)
    assert data.explained(lambda x: dense, dense, dense) == 1.0
    mean = dense.mean(0, keepdims=True).repeat(50, 0)
    assert data.explained(lambda x: mean, dense, dense) == pytest.approx(0, abs=1e-6)


def case(name: str, folder: str, expected: float, *marks):
    return pytest.param(name, expected, id=name, marks=[*needs(folder), *marks])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        case("dscnn_kws", "mlperf_tiny", 0.890),
        case("mobilenetv1_vww", "mlperf_tiny", 1.0, pytest.mark.slow, *needs("gtsrb32")),
        case("shufflenet_gtsrb", "gtsrb32", 1.0, pytest.mark.slow),
        case("efficientnet_gtsrb", "gtsrb32", 1.0, pytest.mark.slow),
        case("resnet20_gtsrb", "gtsrb32", 0.9802, pytest.mark.slow),
        case("resnet56_cifar10_jpeg", "cifar10_jpeg", 0.8922, pytest.mark.slow),
        case("inception_gtsrb", "gtsrb32", 0.9738, pytest.mark.slow),
        case("mobilenetv2_gtsrb", "gtsrb32", 0.9758, pytest.mark.slow),
    ],
)
def test_a_benchmark_project_loads_calibrates_and_reaches_its_accuracy(name, expected):
    project = load_project(BENCHMARKS / "projects" / name)
    network = project.model()
    assert project.calibration(200).samples == 200
    assert project.evaluate(predict_torch(network)) == pytest.approx(expected, abs=5e-4)


def test_every_benchmark_project_is_tested_here():
    assert len(PROJECTS) == 8
    marked = test_a_benchmark_project_loads_calibrates_and_reaches_its_accuracy.pytestmark[0]
    assert sorted(parameter.id for parameter in marked.args[1]) == PROJECTS


@pytest.mark.parametrize("name", [pytest.param(name, marks=needs("gtsrb32")) for name in TRAINED_HERE])
def test_a_project_whose_weights_are_trained_here_takes_others_too(name, tmp_path, monkeypatch):
    monkeypatch.setenv("EDGE_TRAINED", str(tmp_path))
    with pytest.raises(UsageError, match=f"no weights file '{tmp_path}/{name}.safetensors'"):
        load_project(BENCHMARKS / "projects" / name)
    network = getattr(nets, name.replace("gtsrb", "signs"))()
    save_file(network.state_dict(), tmp_path / f"{name}.safetensors")
    project = load_project(BENCHMARKS / "projects" / name)
    assert torch.equal(project.model().fc.weight, network.fc.weight)
    assert project.calibration(200).samples == 200 and project.validates and project.train is not None


@pytest.mark.parametrize("folder", [pytest.param("gtsrb32", marks=needs("gtsrb32"))])
def test_no_sign_of_the_validation_tracks_is_trained_on(folder):
    labels = np.load(data.EDGE_DATA / folder / "labels.npz")
    classes, tracks = labels["y_train"].astype(np.int64), labels["track_train"]
    held_out = data.held_out(classes, tracks)
    pairs = list(zip(classes.tolist(), tracks.tolist(), strict=True))
    trained = {pair for pair, out in zip(pairs, held_out, strict=True) if not out}
    assert not any(pair in trained for pair, out in zip(pairs, held_out, strict=True) if out)
    assert (int(held_out.sum()), len(pairs)) == (3_900, 39_209)


@pytest.mark.parametrize("name", ["resnet20-12fca82f.th", "resnet56-4bfd9763.th"])
def test_the_published_cifar_weights_fit_our_definitions(name):
    from pipeline.project.weights import load_weights, read_weights

    path = data.EDGE_DATA / "cifar10_resnet_weights" / name
    if not path.is_file():
        pytest.skip(f"no weights in {path}; set EDGE_DATA")
    network = nets.resnet20(10) if "20-" in name else nets.resnet56(10)
    load_weights(network, read_weights(path), name, "nets")


@pytest.mark.parametrize(
    ("net", "classes"),
    [
        pytest.param("resnet20_gtsrb", 43, marks=needs("gtsrb32")),
        pytest.param("resnet56_cifar10_jpeg", 10, marks=needs("cifar10_jpeg")),
    ],
)
def test_the_mistakes_of_a_file_are_those_that_its_test_accuracy_counts(net: str, classes: int):
    project, parts = load_project(BENCHMARKS / "projects" / net), []

    def predict(inputs):
        parts.append(np.arange(len(inputs)) % classes)
        return np.eye(classes, dtype=np.float32)[parts[-1]]

    accuracy = project.evaluate(predict)
    test = np.concatenate(parts)
    parts.clear()
    project.validate(predict)
    row = noise.mistakes(net, test, np.concatenate(parts))
    assert 1 - len(row["wrong"]) / len(test) == pytest.approx(accuracy)
