"""Small convolutional networks as ONNX files, and a measuring spec that takes seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from boards import TestBoard, lacking
from onnx import TensorProto, helper, numpy_helper

from profiles.schema import MeasureSpec, Profile, load_profile

MakeConv = Callable[..., Path]


def write_conv(path: Path, channels: int = 16, size: int = 16, layers: int = 2, batch: int | str | None = 1) -> Path:
    """A chain of 3x3 convolutions with ReLU, then the mean of each map: (batch, 3, size, size) -> (batch, channels)."""
    rng = np.random.default_rng(0)
    nodes, weights, last, width = [], [], "input", 3
    for i in range(layers):
        kernel = (rng.standard_normal((channels, width, 3, 3)) * 0.1).astype(np.float32)
        weights.append(numpy_helper.from_array(kernel, f"w{i}"))
        nodes.append(helper.make_node("Conv", [last, f"w{i}"], [f"c{i}"], pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [f"c{i}"], [f"r{i}"]))
        last, width = f"r{i}", channels
    nodes.append(helper.make_node("GlobalAveragePool", [last], ["pooled"]))
    nodes.append(helper.make_node("Flatten", ["pooled"], ["output"]))
    ports = (
        helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch, 3, size, size]),
        helper.make_tensor_value_info("output", TensorProto.FLOAT, [batch, channels]),
    )
    graph = helper.make_graph(nodes, "conv", [ports[0]], [ports[1]], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


@pytest.fixture
def conv(tmp_path: Path) -> MakeConv:
    """Makes such a network under a name in the temporary folder."""
    return lambda name="net", **sizes: write_conv(tmp_path / f"{name}.onnx", **sizes)


@pytest.fixture
def quick() -> MeasureSpec:
    """A spec with few rounds and short warm-ups."""
    return MeasureSpec(
        rank_processes=2,
        rank_rounds=8,
        accept_processes=2,
        accept_rounds=8,
        block_min_ms=1.0,
        warmup_s=0.1,
        warmup_inferences=10,
        warmup_max_s=0.5,
        max_seconds=60.0,
    )


@pytest.fixture
def local() -> Profile:
    """The profile of the machine at hand."""
    return load_profile("local")


@pytest.fixture
def simulated() -> Profile:
    """The profile of the simulated device."""
    return load_profile("simulated")


@pytest.fixture(scope="session")
def whole_board() -> Iterator[TestBoard]:
    """A board in a namespace of this machine, for all tests; skipped where none can be brought up."""
    reason = lacking()
    if reason:
        pytest.skip(reason)
    board = TestBoard()
    yield board
    board.down()


@pytest.fixture(scope="session")
def whole_jetson() -> Iterator[TestBoard]:
    """A board that shows an Orin Nano's files and commands; skipped where none can be brought up."""
    board = jetson_board("jetpack-6.2-orin-nano")
    for name, text in {"mode": "0", "done": ""}.items():
        (board.folder / "jetson" / name).write_text(text)
        (board.folder / "jetson" / name).chmod(0o666)
    yield board
    board.down()


def jetson_board(recording: str) -> TestBoard:
    """A board that shows the files of a recording, and whose commands say what was recorded of it."""
    reason = lacking()
    if reason:
        pytest.skip(reason)
    here = Path(__file__).parent
    return TestBoard(str(here / "recordings" / recording), str(here / "jetson_tools"))


@pytest.fixture
def board(whole_board: TestBoard) -> Iterator[TestBoard]:
    """That board with a sound link; afterwards nothing of ours runs on it, and nothing is left there to be fetched."""
    yield whole_board
    whole_board.mend()
    assert whole_board.quiet()
    assert whole_board.jobs() == []
