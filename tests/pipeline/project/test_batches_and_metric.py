"""What crosses from the user's data and metric into ours."""

import numpy as np
import pytest
import torch
from sample_project import DATA, TOML

from pipeline.project import load_project, predict_torch
from profiles.errors import DeployError

TWO = TOML.replace(
    "input = { shape = [1, 3, 8, 8] }",
    '[[model.inputs]]\nname = "a"\nshape = [1, 2]\n[[model.inputs]]\nname = "ids"\nshape = [1, 3]\ndtype = "int64"\n',
)
TWO_NETS = """
from torch import nn

class net(nn.Module):
    def forward(self, a, ids):
        return a.sum(1, keepdim=True) + ids.float(), ids
"""


def calibration(world, body, toml=TOML, **files):
    return load_project(world(toml, data=DATA + f"\ndef calibration():\n    {body}\n", **files)).calibration(16)


def refusal(world, body, **kwargs):
    with pytest.raises(DeployError) as caught:
        calibration(world, body, **kwargs)
    return caught.value.message


def test_calibration_is_bounded_regrouped_and_the_same_every_time(world):
    project = load_project(world())
    batches = project.calibration(25)
    assert batches.samples == 25
    assert batches.inputs[0][0].dtype == torch.float32
    assert batches.targets.tolist() == [*range(10), *range(10), *range(5)]
    again = project.calibration(25)
    assert all(torch.equal(one[0], two[0]) for one, two in zip(batches.inputs, again.inputs, strict=True))


def test_large_sets_come_in_batches_of_64(world):
    body = "yield np.zeros((150, 3, 8, 8))"
    project = load_project(world(data=DATA + f"\ndef calibration():\n    {body}\n"))
    assert [len(batch[0]) for batch in project.calibration(140).inputs] == [64, 64, 12]


def test_an_endless_calibration_generator_ends_at_the_limit(world):
    assert calibration(world, "while True: yield np.zeros((5, 3, 8, 8))").samples == 16


def test_random_calibration_is_seeded(world):
    body = "import torch; yield np.random.rand(4, 3, 8, 8); yield torch.rand(4, 3, 8, 8)"
    one, two = calibration(world, body), calibration(world, body)
    assert torch.equal(one.inputs[0][0], two.inputs[0][0])


@pytest.mark.parametrize(
    ("body", "targets"),
    [
        ("return [np.zeros((4, 3, 8, 8))]", None),
        ("return np.zeros((4, 2, 3, 8, 8), np.float64)", None),
        ("import torch; return [(torch.zeros(4, 3, 8, 8), [1, 2, 3, 4])]", [1, 2, 3, 4]),
        ("return [([np.zeros((4, 3, 8, 8), np.uint8)], np.arange(4, dtype=np.uint8))]", [0, 1, 2, 3]),
        ("return [{'input': np.zeros((4, 3, 8, 8))}]", None),
    ],
)
def test_every_allowed_form_of_a_batch_is_read(world, body, targets):
    batches = calibration(world, body)
    assert all(tensor.dtype == torch.float32 for batch in batches.inputs for tensor in batch)
    assert (None if batches.targets is None else batches.targets.tolist()) == targets


@pytest.mark.parametrize(
    "item",
    [
        "(np.zeros((4, 2)), np.zeros((4, 3), np.int32))",
        "((np.zeros((4, 2)), np.zeros((4, 3), np.int64)), np.arange(4))",
        "{'ids': np.zeros((4, 3), np.int64), 'a': np.zeros((4, 2))}",
    ],
)
def test_several_inputs_come_as_a_tuple_or_by_name(world, item):
    batches = calibration(world, f"return [{item}]", toml=TWO, nets=TWO_NETS)
    assert [(tuple(t.shape), t.dtype) for t in batches.inputs[0]] == [((4, 2), torch.float32), ((4, 3), torch.int64)]
    assert (batches.targets is not None) == item.startswith("((")


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("return []", "gave no samples: the calibration set is empty."),
        ("return [np.zeros((0, 3, 8, 8))]", "gave no samples: the calibration set is empty."),
        ("return None", "gave nothing (None), not an iterable of batches."),
        (
            "return [np.zeros((2, 3, 9, 8))]",
            "gave inputs of shape [2, 3, 9, 8] for 'input', and deploy.toml says [1, 3, 8, 8].",
        ),
        ("return [np.full((2, 3, 8, 8), np.nan)]", "gave inputs for 'input' that hold NaN or infinity."),
        ("return ['image.png']", "gave a batch of a str, where an array or (inputs, targets) is needed."),
        ("return [np.array(['a'])]", "gave an array of <U1 for the input 'input', not an array of numbers."),
        ("return [(np.zeros((2, 3, 8, 8)), [1])]", "gave 2 inputs and targets of shape [1] in one batch."),
        ("return [(np.zeros((2, 3, 8, 8)), {})]", "gave targets that are a dict, not an array."),
    ],
)
def test_an_odd_calibration_set_is_answered_with_the_function_and_its_line(world, body, sentence):
    line = DATA.count("\n") + 2
    assert refusal(world, body) == f"data:calibration (data.py, line {line}) {sentence}"


def test_floats_for_an_integer_input_are_refused(world):
    message = refusal(world, "return [(np.zeros((4, 2)), np.zeros((4, 3)))]", toml=TWO, nets=TWO_NETS)
    assert message.endswith("gave float64 for the input 'ids', which deploy.toml declares int64.")


def test_a_generator_that_breaks_half_way_is_blamed_with_its_line(world):
    message = refusal(world, "yield np.zeros((4, 3, 8, 8))\n    raise OSError('disk gone')")
    assert message == f"data:calibration failed (data.py, line {DATA.count(chr(10)) + 4}): OSError: disk gone"


def test_training_batches_keep_their_order_and_their_length(world):
    body = "return [(np.full((2, 3, 8, 8), epoch), np.array([seed, k])) for k in range(3)]"
    data = DATA + f"\ndef train(epoch, seed):\n    {body}\n"
    train = load_project(world(TOML + 'train = "data:train"\n', data=data)).train
    batches = train(4, 7)
    assert len(batches) == 3
    assert [(float(x.mean()), y.tolist()) for (x,), y in batches] == [(4.0, [7, k]) for k in range(3)]


def test_a_training_batch_without_targets_is_refused(world):
    data = DATA + "\ndef train(epoch, seed):\n    yield np.zeros((2, 3, 8, 8))\n"
    train = load_project(world(TOML + 'train = "data:train"\n', data=data)).train
    with pytest.raises(DeployError, match=r"^data:train \(data.py, line \d+\) gave a batch without targets."):
        list(train(0, 0))


def test_the_loss_is_cross_entropy_unless_the_project_names_one(world):
    outputs, targets = torch.randn(6, 5), torch.arange(6) % 5
    expected = torch.nn.functional.cross_entropy(outputs, targets)
    assert load_project(world()).loss(outputs, targets) == expected
    named = TOML + 'loss = "data:loss"\n'
    data = DATA + "\ndef loss(outputs, targets):\n    return outputs.square().mean()\n"
    assert load_project(world(named, data=data)).loss(outputs, targets) == outputs.square().mean()
    project = load_project(world(named, data=data.replace(".mean()", "")))
    with pytest.raises(DeployError) as caught:
        project.loss(outputs, targets)
    line = DATA.count("\n") + 2
    given = "a tensor of shape [6, 5], not a scalar tensor."
    assert caught.value.message == f"data:loss (data.py, line {line}) gave {given}"


# --- evaluate ---


def metric(world, body, **kwargs):
    project = load_project(world(data=DATA + f"\ndef evaluate(predict):\n    {body}\n", **kwargs))
    return project.evaluate(predict_torch(project.model()))


def test_predict_takes_any_batch_size_and_gives_what_the_network_gives(world):
    project = load_project(world())
    network = project.model()
    x = np.random.default_rng(0).random((11, 3, 8, 8), np.float32)
    with torch.inference_mode():
        whole = network(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(predict_torch(network, batch=4)(x), whole, atol=1e-6)


def test_predict_leaves_a_training_network_in_training_mode_with_its_statistics(world):
    network = load_project(world()).model().train()
    before = network[1].running_mean.clone()
    predict_torch(network)(np.ones((4, 3, 8, 8), np.float32))
    assert network.training
    assert torch.equal(network[1].running_mean, before)


def test_evaluate_may_give_predict_any_float_type(world):
    assert metric(world, "return predict(np.ones((2, 3, 8, 8)))[:, :1].size") == 2.0


def test_a_network_of_several_inputs_and_outputs_is_judged(world):
    body = "a, b = predict(np.ones((5, 2)), np.ones((5, 3), np.int64)); return a.mean() + b.sum()"
    project = load_project(world(TWO, TWO_NETS, DATA + f"\ndef evaluate(predict):\n    {body}\n"))
    assert project.evaluate(predict_torch(project.model(), batch=2)) == 3 + 15


@pytest.mark.parametrize("value", ["0.5", "np.float32(0.5)", "np.array(0.5)", "__import__('torch').tensor(0.5)", "1"])
def test_any_kind_of_number_is_a_metric(world, value):
    assert metric(world, f"return {value}") == (1.0 if value == "1" else 0.5)


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("float('nan')", "gave nan, which is not a finite number."),
        ("np.float64('inf')", "gave inf, which is not a finite number."),
        ("None", "gave nothing (None), not a number."),
        ("'high'", "gave a str, not a number."),
        ("True", "gave a bool, not a number."),
        ("np.zeros(3)", "gave a ndarray, not a number."),
    ],
)
def test_a_metric_that_is_no_finite_number_is_refused(world, value, sentence):
    with pytest.raises(DeployError) as caught:
        metric(world, f"return {value}")
    assert caught.value.message == f"data:evaluate (data.py, line {DATA.count(chr(10)) + 2}) {sentence}"


def test_an_evaluate_that_raises_is_blamed_with_its_line_and_the_cause_is_chained(world):
    with pytest.raises(DeployError) as caught:
        metric(world, "labels = [1]\n    return labels[3]")
    line = DATA.count("\n") + 4
    assert caught.value.message == f"data:evaluate failed (data.py, line {line}): IndexError: list index out of range"
    assert isinstance(caught.value.__cause__, IndexError)
    assert caught.value.exit_code == 1


def test_an_evaluate_that_gives_predict_nothing_is_refused(world):
    with pytest.raises(DeployError, match=r"^predict was given an empty batch\."):
        metric(world, "return predict(np.zeros((0, 3, 8, 8)))")


def test_an_evaluate_that_forgets_an_input_is_refused(world):
    data = DATA + "\ndef evaluate(predict):\n    return predict(np.ones((5, 2)))\n"
    project = load_project(world(TWO, TWO_NETS, data))
    with pytest.raises(DeployError, match=r"calls predict with 1 arrays, and the network has 2 inputs"):
        project.evaluate(predict_torch(project.model()))


def test_validate_is_none_where_the_project_names_none(world):
    project = load_project(world())
    assert project.validate(predict_torch(project.model())) is None
    project = load_project(world(TOML + 'validate = "data:evaluate"\n'))
    assert project.validate(predict_torch(project.model())) == 5.0
