"""Small graphs and networks that the tests of the graph share."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from pipeline.graph.optimize import optimize_model
from pipeline.graph.verify import check_model, compare_outputs, seeded_inputs


def node(op, inputs, outputs, name=None, **attributes):
    """A node; its name is `/op` unless given."""
    return helper.make_node(
        op, inputs.split(), outputs.split(), name=name or f"/{outputs.split()[0]}/{op}", **attributes
    )


def graph(nodes, x, y, weights=None, outputs=None):
    """A model with the input `x` and the output `y` of these shapes; weights: name -> array or shape (then random)."""
    rng = np.random.default_rng(1)
    arrays = {
        name: (0.5 * rng.standard_normal(value)).astype(np.float32) if isinstance(value, tuple) else value
        for name, value in (weights or {}).items()
    }
    made = helper.make_graph(
        nodes,
        "sample",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            for name, shape in {"y": y, **(outputs or {})}.items()
        ],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def integers(*values):
    """An int64 initializer."""
    return np.array(values, dtype=np.int64)


def norm(prefix, channels):
    """The four parameters of a batch norm, away from 0 and 1."""
    rng = np.random.default_rng(2)
    scale, var = rng.uniform(0.5, 1.5, (2, channels)).astype(np.float32)
    bias, mean = rng.standard_normal((2, channels)).astype(np.float32)
    return {
        f"{prefix}.weight": scale,
        f"{prefix}.bias": bias,
        f"{prefix}.running_mean": mean,
        f"{prefix}.running_var": var,
    }


def ops(model):
    """Operators in order."""
    return [n.op_type for n in model.graph.node]


def weights(model):
    """Initializer name -> array."""
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def run_pass(model, name):
    """Apply one pass to a fixed point, numerics and validity checked; (model, what the first turn says)."""
    check_model(model)
    result, log = optimize_model(model, (name,), tolerance=1e-5)
    check_model(result)
    assert compare_outputs(model, result, seeded_inputs(model, seed=3)).max_rel < 1e-5
    assert log.steps[-1].changed == 0
    return result, log.steps[0]


def imported(model):
    """The graph as a pass sees it."""
    return gs.import_onnx(onnx.shape_inference.infer_shapes(model))


# --- networks --------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """A basic block; the shortcut strides and pads channels with zeros where the shapes differ."""

    def __init__(self, into, out, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(into, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.grow, self.stride = out - into, stride

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1 or self.grow:
            half = self.grow // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, self.grow - half))
        return F.relu(y + x)


class ResNet(nn.Module):
    """CIFAR-like residual network with zero-padded shortcuts."""

    def __init__(self, blocks=1, widths=(8, 16), classes=5):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0])
        layers, into = [], widths[0]
        for stage, width in enumerate(widths):
            for index in range(blocks):
                layers.append(Residual(into, width, 2 if stage and not index else 1))
                into = width
        self.blocks = nn.Sequential(*layers)
        self.linear = nn.Linear(into, classes)

    def forward(self, x):
        x = self.blocks(F.relu(self.bn1(self.conv1(x))))
        return self.linear(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class Mobile(nn.Module):
    """Depthwise separable layers, dropout, and one grouped convolution."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8)
        self.deep = nn.Conv2d(8, 8, 3, 1, 1, groups=8)
        self.point = nn.Conv2d(8, 12, 1)
        self.group = nn.Conv2d(12, 16, 3, 1, 1, groups=2)
        self.drop, self.head = nn.Dropout(0.3), nn.Linear(16 * 64, 5)

    def forward(self, x):
        x = F.relu(self.group(F.relu(self.point(F.relu(self.deep(F.relu(self.bn(self.stem(x)))))))))
        return self.head(self.drop(torch.flatten(x, 1)))


class Mixed(nn.Module):
    """Split, concat, a shuffle of channels, and a transposed convolution."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 12, 3, 1, 1), nn.Conv2d(6, 6, 3, 1, 1), nn.Conv2d(12, 8, 1)
        self.up, self.bn, self.last = nn.ConvTranspose2d(8, 6, 2, 2), nn.BatchNorm2d(6), nn.Conv2d(6, 3, 1)

    def forward(self, x):
        left, right = torch.split(F.relu(self.a(x)), [6, 6], 1)
        y = torch.cat([left, F.relu(self.b(right))], 1)
        n, c, h, w = y.shape
        y = y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.last(F.relu(self.bn(self.up(F.relu(self.c(y))))))


def shaken(net, seed=0):
    """The network in eval mode with random norms."""
    torch.manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 1.5)
            for tensor in (module.bias.data, module.running_mean):
                tensor.normal_(0, 0.2)
    return net.eval()
