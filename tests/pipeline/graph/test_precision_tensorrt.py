"""The ONNX of a network in half is taken by TensorRT's strongly typed parser and built, without a GPU.

Needs the wheels tensorrt-rtx-cu13-libs and tensorrt-rtx-cu13-bindings; skipped where they are not installed.
"""

import numpy as np
import onnx
import pytest
from graph_samples import graph, node
from onnx import TensorProto
from test_precision_half import NETS, Loud, exported

from pipeline.graph.precision.half import halve
from pipeline.graph.probe import tensor_types
from pipeline.graph.verify import seeded_inputs

trt = pytest.importorskip("tensorrt_rtx_bindings", reason="tensorrt-rtx-cu13-bindings is not installed")


class Silent(trt.ILogger):
    """Keeps what TensorRT complains of."""

    def __init__(self):
        trt.ILogger.__init__(self)
        self.complaints = []

    def log(self, severity, message):
        if severity <= trt.ILogger.Severity.WARNING:
            self.complaints.append(message)


def built(model):
    """(tensor name -> type) of a network that was parsed and built for SM 8.6."""
    logger = Silent()
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(model.SerializeToString()), [parser.get_error(i).desc() for i in range(parser.num_errors)]
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    tensors = [layer.get_output(i) for layer in layers for i in range(layer.num_outputs)]
    tensors += [network.get_input(i) for i in range(network.num_inputs)]
    types = {tensor.name: tensor.dtype for tensor in tensors}
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    plan = builder.build_serialized_network(network, config)
    assert plan is not None and plan.nbytes > 10_000 and logger.complaints == []
    return types


def quantised_in_part(folder):
    """A convolution of int8 with quantised weights, then one of floats."""
    rng = np.random.default_rng(0)
    nodes = [
        node("QuantizeLinear", "x s z", "q"), node("DequantizeLinear", "q s z", "d"),
        node("DequantizeLinear", "w t z", "dw"), node("Conv", "d dw", "c"), node("Relu", "c", "r"),
        node("Conv", "r v", "e"), node("Relu", "e", "y"),
    ]  # fmt: skip
    stored = {
        "s": np.float32(0.1), "t": np.float32(0.02), "z": np.int8(0), "v": (16, 16, 1, 1),
        "w": rng.integers(-100, 100, (16, 3, 3, 3)).astype(np.int8),
    }  # fmt: skip
    return graph(nodes, (1, 3, 18, 18), (1, 16, 16, 16), stored)


CASES = {name: lambda folder, net=net: exported(net, folder) for name, net in {**NETS, "loud": Loud}.items()}
CASES["quantised"] = quantised_in_part


@pytest.mark.parametrize("name", list(CASES))
def test_tensorrt_builds_the_network_in_half_with_the_types_that_the_file_says(name, tmp_path):
    model = CASES[name](tmp_path)
    half, done = halve(model, seeded_inputs(model, 5, 8))
    types = built(half)
    told = {TensorProto.FLOAT: trt.float32, TensorProto.FLOAT16: trt.float16}
    said = {name: told[kind] for name, kind in tensor_types(half).items() if kind in told and name in types}
    assert {name: types[name] for name in said} == said
    assert {types[i.name] for i in half.graph.input} == {types[o.name] for o in half.graph.output} == {trt.float32}
    assert sum(kind == trt.float16 for kind in types.values()) >= 0.9 * done.nodes - 2


def test_tensorrt_refuses_types_that_do_not_meet():
    """What the parser accepts is not anything: a sum of half and float32 has no type."""
    model = graph([node("Relu", "x", "y")], (1, 4), (1, 4))
    model.graph.node[0].CopyFrom(onnx.helper.make_node("Cast", ["x"], ["h"], to=TensorProto.FLOAT16))
    model.graph.node.append(node("Add", "h x", "y"))
    network = trt.Builder(Silent()).create_network(0)
    assert not trt.OnnxParser(network, Silent()).parse(model.SerializeToString())
