"""Weights files: the forms that are met, and what is refused."""

import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sample_project import NETS, TOML

from pipeline.project import load_project, predict_torch
from pipeline.project.weights import read_weights
from profiles.errors import DeployError


@pytest.fixture
def state(world):
    torch.manual_seed(1)
    dense = load_project(world()).model().state_dict()
    return {name: torch.rand_like(t) if t.is_floating_point() else t for name, t in dense.items()}


def project_with(world, name):
    return load_project(world(TOML.replace('"nets:net"', f'"nets:net"\nweights = "{name}"')))


def refusal(world, name):
    with pytest.raises(DeployError) as caught:
        project_with(world, name).model()
    return caught.value


@pytest.mark.parametrize(
    "form",
    [
        lambda s: s,
        lambda s: {"state_dict": s, "best_prec1": 93.2},
        lambda s: {"state": s, "mean": [0.5], "epoch": 3},
        lambda s: {"model": {f"module.{name}": t for name, t in s.items()}},
        lambda s: {f"module._orig_mod.{name}": t for name, t in s.items()},
        lambda s: {name: t for name, t in s.items() if "num_batches_tracked" not in name},
    ],
)
def test_every_common_form_of_a_torch_file_is_read(world, tmp_path, state, form):
    torch.save(form(state), tmp_path / "net.pt")
    loaded = project_with(world, "../net.pt").model().state_dict()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_safetensors_are_read_and_the_network_is_in_eval_mode(world, tmp_path, state):
    save_file(state, tmp_path / "net.safetensors")
    network = project_with(world, "../net.safetensors").model()
    assert not network.training
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def test_weights_that_do_not_fit_are_named_with_both_shapes(world, tmp_path, state):
    state["head.weight"] = state.pop("5.weight")
    state["0.bias"] = torch.zeros(7)
    save_file(state, tmp_path / "net.safetensors")
    error = refusal(world, "../net.safetensors")
    assert error.message == (
        f"the weights {tmp_path}/net.safetensors do not fit nets:net: "
        "missing 5.weight; unexpected head.weight; 0.bias is [7] in the file and [4] in the network."
    )
    assert error.hint == "the factory must build the network that was trained: mend model.factory or model.weights."


def test_a_long_list_of_misfits_is_cut_short(world, tmp_path):
    save_file({f"x{i}": torch.zeros(1) for i in range(9)}, tmp_path / "net.safetensors")
    assert "unexpected x0, x1, x2, x3 and 5 more" in refusal(world, "../net.safetensors").message


class Trap:
    """Unpickled, it would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("wrap", [lambda trap: trap, lambda trap: {"state_dict": {"w": torch.zeros(1)}, "extra": trap}])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(world, tmp_path, wrap):
    torch.save(wrap(Trap(tmp_path / "sprung")), tmp_path / "net.pt")
    error = refusal(world, "../net.pt")
    path = f"{tmp_path}/net.pt"
    assert error.message == f"{path} is a pickle that would run code when loaded (io.open), and is refused."
    assert error.hint.startswith("convert it once, where you trust it: python -c ")
    assert "save_file" in error.hint
    assert not (tmp_path / "sprung").exists()


def test_a_bare_pickle_is_refused_and_does_not_run(world, tmp_path):
    (tmp_path / "net.pt").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    assert "net.pt is a pickle that would run code when loaded" in refusal(world, "../net.pt").message
    assert not (tmp_path / "sprung").exists()


def test_a_whole_pickled_network_is_refused(world, tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "net.pt")
    assert "(torch.nn.modules.linear.Linear), and is refused." in refusal(world, "../net.pt").message


@pytest.mark.parametrize(
    ("name", "content"), [("net.pt", b"no weights"), ("net.pt", b""), ("net.safetensors", b"no weights")]
)
def test_a_file_that_is_no_weights_file_is_refused(world, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert f"{name} is not a weights file that can be read: " in refusal(world, f"../{name}").message


def test_a_truncated_file_is_refused(world, tmp_path, state):
    torch.save(state, tmp_path / "net.pt")
    content = (tmp_path / "net.pt").read_bytes()
    (tmp_path / "net.pt").write_bytes(content[: len(content) // 2])
    assert "net.pt is not a weights file that can be read: " in refusal(world, "../net.pt").message


def test_a_torch_file_without_a_state_dict_is_refused_with_its_keys(tmp_path):
    torch.save({"epoch": 3, "lr": 0.1}, tmp_path / "net.pt")
    with pytest.raises(DeployError) as caught:
        read_weights(tmp_path / "net.pt")
    assert caught.value.message == f"{tmp_path / 'net.pt'} holds no state dict; its keys: epoch, lr."
    torch.save(torch.zeros(3), tmp_path / "net.pt")
    with pytest.raises(DeployError, match=r"holds a Tensor, not a state dict\."):
        read_weights(tmp_path / "net.pt")


def test_an_input_shape_that_the_network_refuses_is_named(world):
    nets = NETS.replace("nn.AdaptiveAvgPool2d(1), ", "").replace("nn.Linear(4, 5)", "nn.Linear(144, 5)")
    load_project(world(nets=nets)).model()
    with pytest.raises(DeployError) as caught:
        load_project(world(TOML.replace("[1, 3, 8, 8]", "[1, 3, 7, 8]"), nets=nets)).model()
    assert caught.value.message == (
        "the network refuses an input of shape [1, 3, 7, 8]: "
        "mat1 and mat2 shapes cannot be multiplied (1x120 and 144x5)"
    )
    assert caught.value.hint == "set model.input in deploy.toml to what the network takes, batch axis first."


def test_a_network_that_gives_no_tensors_is_refused(world):
    nets = "from torch import nn\nclass net(nn.Module):\n    def forward(self, x):\n        return {'logits': 3}\n"
    with pytest.raises(DeployError) as caught:
        load_project(world(nets=nets)).model()
    assert caught.value.message == "the network gives a dict, not a tensor or a tuple of tensors."


def test_a_network_may_give_its_tensors_in_dicts_and_lists(world):
    gives = "return {'a': x[:, 0], 'rest': [x[:, 1:], (x.sum((1, 2, 3)),)]}"
    nets = f"from torch import nn\nclass net(nn.Module):\n    def forward(self, x):\n        {gives}\n"
    predict = predict_torch(load_project(world(nets=nets)).model(), batch=2)
    outputs = predict(np.ones((5, 3, 8, 8), np.float32))
    assert [array.shape for array in outputs] == [(5, 8, 8), (5, 2, 8, 8), (5,)]
