"""What a network gives is read in one order everywhere: that of its ONNX file's outputs."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import nn

from pipeline.graph.export import export
from pipeline.outputs import parts, tensors
from pipeline.project.project import predict_torch
from profiles.schema import InputSpec


class Nested(nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, object]:
        return {"last": (x * 4, [x * 3]), "first": {"b": x * 2, "a": x}}


def test_nested_outputs_lie_as_in_the_onnx_file(tmp_path: Path):
    x = torch.ones(1, 2)
    outputs = Nested()(x)
    assert [float(each[0, 0]) for each in tensors(outputs)] == [4, 3, 2, 1]
    file = export(Nested(), (InputSpec(shape=(1, 2)),), tmp_path / "nested.onnx", 17)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert [float(each[0, 0]) for each in found] == [4, 3, 2, 1]
    assert [float(each[0, 0]) for each in predict_torch(Nested())(x.numpy())] == [4, 3, 2, 1]


@pytest.mark.parametrize(("value", "whole", "kept"), [(None, 1, 0), ((), 0, 0), ([3, torch.ones(1)], 2, 1), ({}, 0, 0)])
def test_what_is_no_tensor_is_a_part_and_no_tensor(value: object, whole: int, kept: int):
    assert len(parts(value)) == whole and len(tensors(value)) == kept
