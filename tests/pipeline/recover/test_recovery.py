"""A recovery for real: digits, a damaged network, its dense teacher."""

import copy
import itertools
import json
import math
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import safetensors
import tiny_digits as digits
import torch

from pipeline.recover import train as training
from pipeline.recover.schedule import learning_rate
from pipeline.recover.train import HOLD_OUT_EVERY, RecoverData, Recovered, recover
from profiles.errors import DeployError, UsageError
from profiles.schema import RecoverSpec

DATA = RecoverData(digits.train, digits.loss, digits.accuracy)
SPEC = RecoverSpec(epochs=3, learning_rate=0.05)


def run(path: Path, data: RecoverData = DATA, spec: RecoverSpec = SPEC, **kwargs) -> Recovered:
    return recover(digits.damaged(), digits.dense(), data, spec, path / "checkpoint", **kwargs)


def same(one: torch.nn.Module, two: torch.nn.Module) -> bool:
    left, right = one.state_dict(), two.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def scripted(scores: list[float], dense: float = 0.0):
    """A `validate` that gives these scores in turn, the first for the start, and keeps what it was shown.

    dense: the score of the dense network; no gain is too small for 0.
    """
    shown: list[torch.nn.Module] = []

    def validate(network: torch.nn.Module) -> float:
        if same(network, digits.dense()):
            return dense
        shown.append(copy.deepcopy(network))
        return scores[len(shown) - 1]

    return validate, shown


# --- that it works ---


def test_a_damaged_network_recovers_what_it_knew(tmp_path):
    before = digits.accuracy(digits.damaged())
    recovered = run(tmp_path)
    assert before < 0.8
    assert digits.accuracy(digits.dense()) > 0.95
    assert digits.accuracy(recovered.module) > 0.95
    assert recovered.best_score == digits.accuracy(recovered.module)
    assert recovered.start_score == before
    assert recovered.stopped == "finished"
    assert [epoch.steps for epoch in recovered.history] == [20, 20, 20]
    assert not recovered.module.training


def test_a_damaged_network_recovers_from_the_teacher_alone(tmp_path):
    def no_labels(outputs, targets):
        raise AssertionError("labels were asked for")

    data = RecoverData(digits.train, no_labels, digits.accuracy)
    recovered = run(tmp_path, data, SPEC.model_copy(update={"alpha": 1.0}))
    assert digits.accuracy(recovered.module) > 0.95


class Marked(NamedTuple):
    boxes: torch.Tensor
    name: str


class Named(dict):
    """A dict of a kind of its own."""


def test_targets_are_moved_to_the_device_wherever_they_lie_and_keep_their_form():
    given = Named(a=[torch.zeros(2), 3], b=(torch.zeros(3), {"c": Marked(torch.zeros(4), "a")}), d=None)
    moved = training._on(given, torch.device("meta"))
    a, (b, inner) = moved["a"], moved["b"]
    assert all(each.is_meta for each in (a[0], b, inner["c"].boxes))
    assert [tuple(each.shape) for each in (a[0], b, inner["c"].boxes)] == [(2,), (3,), (4,)]
    assert (type(moved), type(a), type(inner["c"])) == (Named, list, Marked) and list(moved) == ["a", "b", "d"]
    assert a[1] == 3 and inner["c"].name == "a" and moved["d"] is None
    assert not given["a"][0].is_meta and not given["b"][0].is_meta, "what was given stays as it was"


def test_neither_network_that_was_given_is_touched(tmp_path):
    pruned, dense = digits.damaged().train(), digits.dense()
    copies = copy.deepcopy((pruned, dense))
    recover(pruned, dense, DATA, SPEC.model_copy(update={"epochs": 1}), tmp_path / "c")
    assert same(pruned, copies[0])
    assert same(dense, copies[1])
    assert pruned.training
    assert not dense.training


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(tmp_path):
    spec = SPEC.model_copy(update={"epochs": 1})
    runs = [run(tmp_path / str(i), spec=spec.model_copy(update={"seed": seed})) for i, seed in enumerate((0, 0, 1))]
    assert same(runs[0].module, runs[1].module)
    assert not same(runs[0].module, runs[2].module)


def test_the_global_random_state_is_left_as_it_was(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    digits_spec = SPEC.model_copy(update={"epochs": 1})
    pruned, dense = digits.dense(), digits.dense()
    torch.manual_seed(5)
    recover(pruned, dense, DATA, digits_spec, tmp_path / "c")
    assert torch.equal(torch.rand(3), expected)


def test_progress_counts_every_planned_step(tmp_path):
    seen = []
    run(tmp_path, progress=lambda done, planned: seen.append((done, planned)))
    assert seen == [(step + 1, 60) for step in range(60)]


def test_a_last_batch_of_one_sample_is_left_out(tmp_path):
    def odd(epoch, seed):
        batches = list(digits.train(epoch, seed))
        (images,), labels = batches[0]
        return [*batches[:3], ((images[:1],), labels[:1])]

    recovered = run(tmp_path, RecoverData(odd, digits.loss, digits.accuracy))
    assert [epoch.steps for epoch in recovered.history] == [3, 3, 3]


def test_norms_and_biases_do_not_decay(tmp_path):
    """Without gradient only decay moves weights: what has one axis must stay."""
    still = RecoverData(digits.train, lambda outputs, targets: 0.0 * outputs.sum(), scripted([0.0, 1.0])[0])
    spec = RecoverSpec(epochs=1, alpha=0.0, weight_decay=0.1)
    moved = dict(run(tmp_path, still, spec).module.named_parameters())
    for name, start in digits.damaged().named_parameters():
        assert torch.equal(moved[name], start) == (start.ndim <= 1), name


# --- killed and resumed ---


@pytest.mark.parametrize("killed_at", [7, 27, 40, 59])
def test_a_recovery_that_was_interrupted_ends_bit_for_bit_as_one_that_was_not(tmp_path, killed_at):
    def interrupt(done: int, planned: int) -> None:
        if done == killed_at:
            raise KeyboardInterrupt

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "torn", progress=interrupt)
    resumed = run(tmp_path / "torn")
    assert resumed.resumed_epochs == (killed_at - 1) // 20
    assert same(resumed.module, whole.module)
    assert [(e.loss, e.validate) for e in resumed.history] == [(e.loss, e.validate) for e in whole.history]


def test_a_recovery_killed_by_sigkill_ends_bit_for_bit_as_one_that_was_not(tmp_path):
    script = (
        "import os, signal, sys; from pathlib import Path; import torch; torch.set_num_threads(1)\n"
        "from test_recovery import run\n"
        "run(Path(sys.argv[1]), progress=lambda done, planned: done == 33 and os.kill(os.getpid(), signal.SIGKILL))\n"
    )
    root = Path(__file__).parents[3]
    paths = {"PYTHONPATH": f"{root}:{Path(__file__).parent}", "PATH": "/usr/bin:/bin"}
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path / "torn")], env=paths, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in (tmp_path / "torn").iterdir()] == ["checkpoint"]
    resumed = run(tmp_path / "torn")
    assert resumed.resumed_epochs == 1
    assert same(resumed.module, run(tmp_path / "whole").module)


def test_a_finished_recovery_is_not_run_again(tmp_path):
    first = run(tmp_path)

    def never(epoch, seed):
        raise AssertionError("training data was asked for")

    again = run(tmp_path, RecoverData(never, digits.loss, digits.accuracy))
    assert same(first.module, again.module)
    assert again.history == first.history


@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"x" * len(data)]
)
def test_a_damaged_checkpoint_is_begun_again(tmp_path, damage):
    whole = run(tmp_path)
    (tmp_path / "checkpoint").write_bytes(damage((tmp_path / "checkpoint").read_bytes()))
    again = run(tmp_path)
    assert again.resumed_epochs == 0
    assert same(again.module, whole.module)


def test_a_checkpoint_of_another_start_or_other_settings_is_not_continued(tmp_path):
    run(tmp_path)
    other = recover(digits.damaged(0.5), digits.dense(), DATA, SPEC, tmp_path / "checkpoint")
    assert other.resumed_epochs == 0
    assert run(tmp_path, spec=SPEC.model_copy(update={"epochs": 1})).resumed_epochs == 0


def test_the_checkpoint_is_safetensors_with_its_story_as_json(tmp_path):
    run(tmp_path)
    with safetensors.safe_open(tmp_path / "checkpoint", framework="pt") as file:
        assert '"stopped": "finished"' in file.metadata()["story"]
        assert {key.split("/")[0] for key in file.keys()} == {"now", "best", "momentum"}  # noqa: SIM118


def test_a_checkpoint_that_cannot_be_written_is_an_error_and_leaves_no_half_file(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(DeployError) as caught:
            run(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    name, text = caught.value.message.split(" (")[0], caught.value.message.split("MiB) ")[1]
    assert name == f"the recovery checkpoint '{tmp_path / 'checkpoint'}'"
    assert text == "could not be written: File too large."
    assert caught.value.hint == "free some space and run again with --resume."
    assert list(tmp_path.iterdir()) == []


# --- when it stops, and what it keeps ---


def test_the_best_epoch_is_kept_not_the_last(tmp_path):
    validate, shown = scripted([0.1, 0.2, 0.9, 0.3])
    recovered = run(tmp_path, RecoverData(digits.train, digits.loss, validate))
    assert (recovered.best_epoch, recovered.best_score) == (1, 0.9)
    assert same(recovered.module, shown[2])


def test_a_recovery_that_only_gets_worse_keeps_the_start(tmp_path):
    validate, _ = scripted([0.5, 0.4, 0.3, 0.5, 0.4, 0.5, 0.5])
    recovered = run(tmp_path, RecoverData(digits.train, digits.loss, validate))
    assert (recovered.stopped, recovered.best_epoch, len(recovered.history)) == ("finished", None, 6)
    assert recovered.best_score == recovered.start_score == 0.5
    assert same(recovered.module, digits.damaged())


def test_it_stops_when_nothing_gets_better_but_not_before_the_peak_of_the_cycle(tmp_path):
    """Ten epochs: the learning rate peaks in the third, so scores count from there; two without a better one end it."""
    validate, shown = scripted([0.1, 0.9, 0.8, 0.3, 0.4, 0.5, 0.4, 0.4, 0.9])
    spec = RecoverSpec(epochs=10, patience=2)
    recovered = run(tmp_path, RecoverData(digits.train, digits.loss, validate), spec)
    assert recovered.stopped == "patience"
    assert [epoch.validate for epoch in recovered.history] == [0.9, 0.8, 0.3, 0.4, 0.5, 0.4, 0.4]
    assert recovered.best_epoch == 0
    assert same(recovered.module, shown[1])


def test_no_epochs_or_no_minutes_keep_the_start(tmp_path):
    for field, stopped in (("epochs", "finished"), ("max_minutes", "time")):
        recovered = run(tmp_path / field, spec=SPEC.model_copy(update={field: 0}))
        assert (recovered.stopped, recovered.history) == (stopped, ())
        assert same(recovered.module, digits.damaged())


class Clock:
    """Time that passes only when training batches are read, so that the minutes mean the same on every machine."""

    def __init__(self, monkeypatch, seconds: list[float]) -> None:
        self.now, self.seconds = 0.0, seconds
        monkeypatch.setattr(training, "monotonic", lambda: self.now)

    def train(self, epoch, seed):
        for index, batch in enumerate(digits.train(epoch, seed)):
            self.now += self.seconds[min(index, len(self.seconds) - 1)]
            yield batch


def test_the_cycle_is_shortened_to_the_minutes_and_still_falls_to_its_end(tmp_path, monkeypatch):
    rates = []

    def recorded(step, steps, peak):
        rates.append(learning_rate(step, steps, peak))
        return rates[-1]

    monkeypatch.setattr(training, "learning_rate", recorded)
    data = RecoverData(Clock(monkeypatch, [1.0]).train, digits.loss, digits.accuracy)
    recovered = run(tmp_path, data, RecoverSpec(epochs=40, max_minutes=1.5))
    assert recovered.stopped == "time"
    assert recovered.planned_steps == int(0.9 * (90 - 20))  # 20 s went into counting the batches of an epoch
    assert [epoch.steps for epoch in recovered.history] == [20, 20, 20, 3]
    assert len(rates) == 63
    assert rates[-1] < 0.001 * max(rates)


def test_a_shortened_recovery_that_is_resumed_keeps_its_plan_and_its_bits(tmp_path, monkeypatch):
    def interrupt(done: int, planned: int) -> None:
        if done == 45:
            raise KeyboardInterrupt

    def go(folder: str, progress=None) -> Recovered:
        data = RecoverData(Clock(monkeypatch, [1.0]).train, digits.loss, digits.accuracy)
        return run(tmp_path / folder, data, RecoverSpec(epochs=40, max_minutes=1.5), progress=progress)

    whole = go("whole")
    with pytest.raises(KeyboardInterrupt):
        go("torn", interrupt)
    resumed = go("torn")
    assert (resumed.resumed_epochs, resumed.planned_steps) == (2, whole.planned_steps)
    assert same(resumed.module, whole.module)


def test_a_recovery_slower_than_planned_stops_in_the_middle_of_an_epoch_and_stays_stopped(tmp_path, monkeypatch):
    data = RecoverData(Clock(monkeypatch, [0.0] * 10 + [6.0]).train, digits.loss, digits.accuracy)
    spec = RecoverSpec(epochs=2, max_minutes=1.5)
    recovered = run(tmp_path, data, spec)
    assert recovered.stopped == "time"
    assert [epoch.steps for epoch in recovered.history] == [14]  # 60 s for counting, then 10 batches at once, 6 s each
    again = run(tmp_path, data, spec)
    assert same(again.module, recovered.module)
    assert again.history == recovered.history


def test_the_only_epoch_is_not_finished_where_the_time_broke_it_off(tmp_path, monkeypatch):
    data = RecoverData(Clock(monkeypatch, [0.0] * 10 + [6.0]).train, digits.loss, digits.accuracy)
    recovered = run(tmp_path, data, RecoverSpec(epochs=1, max_minutes=1.5))
    assert recovered.stopped == "time"
    assert [epoch.steps for epoch in recovered.history] == [14]


@pytest.mark.parametrize("dense_s", [5.0, 20.0, 40.0, 80.0])
def test_the_minutes_hold_however_long_the_score_of_the_dense_network_takes(tmp_path, monkeypatch, dense_s):
    clock = Clock(monkeypatch, [1.0])

    def validate(network: torch.nn.Module) -> float:
        clock.now += dense_s if same(network, digits.dense()) else 5.0
        return digits.accuracy(network)

    run(tmp_path, RecoverData(clock.train, digits.loss, validate), RecoverSpec(epochs=1, max_minutes=2))
    assert clock.now <= 120


def test_the_minutes_hold_with_the_last_score_counted_in(tmp_path, monkeypatch):
    clock = Clock(monkeypatch, [1.0])

    def validate(network: torch.nn.Module) -> float:
        clock.now += 10.0
        return digits.accuracy(network)

    recovered = run(tmp_path, RecoverData(clock.train, digits.loss, validate), RecoverSpec(epochs=40, max_minutes=1.5))
    assert recovered.stopped == "time"
    assert recovered.history[0].steps == 20
    assert clock.now <= 90


def recorded_peaks(monkeypatch) -> list[float]:
    peaks: list[float] = []

    def recorded(step, steps, peak):
        peaks.append(peak)
        return learning_rate(step, steps, peak)

    monkeypatch.setattr(training, "learning_rate", recorded)
    return peaks


# --- divergence ---


def nan_at(*calls: int):
    count = itertools.count()

    def loss(outputs, targets):
        return digits.loss(outputs, targets) * (math.nan if next(count) in calls else 1.0)

    return loss


def test_a_loss_that_is_not_finite_sends_it_back_once_with_half_the_learning_rate(tmp_path, monkeypatch):
    peaks = recorded_peaks(monkeypatch)
    recovered = run(tmp_path, RecoverData(digits.train, nan_at(34), digits.accuracy))
    assert recovered.stopped == "finished"
    assert [epoch.attempt for epoch in recovered.history] == [0, 1, 1, 1]
    assert recovered.diverged == (0.05,)
    assert peaks[0] == 0.05
    assert peaks[-60:] == [0.025] * 60
    assert digits.accuracy(recovered.module) > 0.95


def test_a_divergence_of_the_second_cycle_names_its_own_rates(tmp_path):
    validate, _ = scripted([0.9, *[0.5] * 9])
    recovered = run(tmp_path, RecoverData(digits.train, nan_at(*range(64, 1000)), validate))
    assert (recovered.stopped, [epoch.attempt for epoch in recovered.history]) == ("diverged", [0, 0, 0])
    assert recovered.diverged == pytest.approx((0.005, 0.0025))


def test_a_second_divergence_ends_it_and_the_repaired_network_is_kept(tmp_path):
    recovered = run(tmp_path, RecoverData(digits.train, nan_at(*range(1000)), digits.accuracy))
    assert (recovered.stopped, recovered.best_epoch, recovered.history) == ("diverged", None, ())
    assert same(recovered.module, digits.damaged())
    assert digits.accuracy(recovered.module) == recovered.start_score


# --- little better than it began ---


def test_epochs_that_never_beat_the_start_are_tried_once_more_with_a_tenth_of_the_rate(tmp_path, monkeypatch):
    peaks = recorded_peaks(monkeypatch)
    validate, shown = scripted([0.9, 0.5, 0.6, 0.7, 0.91, 0.8, 0.85])
    recovered = run(tmp_path, RecoverData(digits.train, digits.loss, validate))
    assert [epoch.attempt for epoch in recovered.history] == [0, 0, 0, 1, 1, 1]
    assert peaks == [0.05] * 60 + [pytest.approx(0.005)] * 60
    assert [epoch.peak for epoch in recovered.history] == [0.05] * 3 + [pytest.approx(0.005)] * 3
    assert (recovered.stopped, recovered.best_epoch, recovered.best_score) == ("finished", 3, 0.91)
    assert same(recovered.module, shown[4])


def test_epochs_that_close_less_than_half_of_the_gap_are_tried_once_more_and_the_best_of_both_is_kept(tmp_path):
    for second, best in ((0.7, 3), (0.55, 1)):
        validate, _ = scripted([0.5, 0.54, 0.59, 0.58, second, 0.52, 0.53], dense=0.7)
        recovered = run(tmp_path / f"{best}", RecoverData(digits.train, digits.loss, validate))
        assert [epoch.attempt for epoch in recovered.history] == [0, 0, 0, 1, 1, 1]
        assert (recovered.stopped, recovered.best_epoch) == ("finished", best)
        assert recovered.best_score == max(second, 0.59)


def test_epochs_that_close_half_of_the_gap_are_enough(tmp_path):
    validate, _ = scripted([0.5, 0.54, 0.625, 0.58], dense=0.75)
    assert len(run(tmp_path, RecoverData(digits.train, digits.loss, validate)).history) == 3


def test_a_second_cycle_is_taken_only_where_it_is_asked_for(tmp_path):
    validate, _ = scripted([0.5, 0.4, 0.4, 0.4], dense=0.75)
    recovered = run(tmp_path, RecoverData(digits.train, digits.loss, validate), again=False)
    assert (recovered.stopped, len(recovered.history)) == ("finished", 3)


def test_without_distillation_the_dense_network_is_not_asked(tmp_path):
    class Asked(torch.nn.Module):
        def forward(self, *inputs):
            raise AssertionError("the dense network was asked")

    spec = SPEC.model_copy(update={"alpha": 0.0})
    recovered = recover(digits.damaged(), Asked(), DATA, spec, tmp_path / "checkpoint", again=False)
    assert digits.accuracy(recovered.module) > 0.95


def test_a_good_network_is_bettered_by_the_smaller_rate_and_not_by_one_that_undoes_it(tmp_path):
    good = run(tmp_path / "first").module
    spec = RecoverSpec(epochs=1, learning_rate=1.0, seed=1)
    again = recover(good, digits.dense(), RecoverData(digits.train, digits.loss), spec, tmp_path / "second")
    first, second = again.history
    assert (first.attempt, second.attempt) == (0, 1)
    assert first.validate < again.start_score < second.validate == again.best_score


def test_there_is_no_second_cycle_without_the_time_for_it(tmp_path, monkeypatch):
    clock = Clock(monkeypatch, [1.0])
    validate, _ = scripted([0.9, *[0.5] * 50])
    recovered = run(
        tmp_path, RecoverData(clock.train, digits.loss, validate), RecoverSpec(epochs=1, max_minutes=30 / 60)
    )
    assert len(recovered.history) == 1
    assert clock.now <= 30


def test_a_recovery_that_is_killed_in_its_second_cycle_ends_as_one_that_was_not(tmp_path):
    scores = [0.9, 0.5, 0.6, 0.7, 0.91, 0.8, 0.95]
    count = itertools.count(1)

    def interrupt(done: int, planned: int) -> None:
        if next(count) == 90:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "torn", RecoverData(digits.train, digits.loss, scripted(scores)[0]), progress=interrupt)
    rest = RecoverData(digits.train, digits.loss, scripted(scores[5:])[0])
    torn = run(tmp_path / "torn", rest)
    whole = run(tmp_path / "whole", RecoverData(digits.train, digits.loss, scripted(scores)[0]))
    assert torn.resumed_epochs == 1
    assert same(torn.module, whole.module)
    assert [e.validate for e in torn.history] == [e.validate for e in whole.history]


# --- without validate ---


def test_without_validate_every_tenth_batch_is_held_out_of_training(tmp_path, monkeypatch):
    trained = []

    def recording(outputs, targets):
        if outputs.requires_grad:
            trained.append(targets)
        return digits.loss(outputs, targets)

    recovered = run(tmp_path, RecoverData(digits.train, recording), SPEC.model_copy(update={"epochs": 1}))
    batches = [targets for _, targets in digits.train(0, SPEC.seed)]
    held_out = batches[::HOLD_OUT_EVERY]
    assert recovered.history[0].steps == len(batches) - len(held_out) == 18
    assert not any(torch.equal(targets, held) for targets in trained for held in held_out)
    assert recovered.best_score > recovered.start_score
    assert digits.accuracy(recovered.module) > 0.9


def test_a_score_that_is_not_finite_is_written_as_none(tmp_path):
    data = RecoverData(digits.train, digits.loss, scripted([-math.inf, math.nan, 0.5, 0.4])[0])
    table = json.loads(json.dumps(run(tmp_path, data).to_table(), allow_nan=False))
    assert (table["from"], table["to"], table["kept"]) == (None, 0.5, 1)
    assert [epoch[2] for epoch in table["history"]] == [None, 0.5, 0.4]


def test_training_data_without_batches_is_an_error(tmp_path):
    with pytest.raises(DeployError) as caught:
        run(tmp_path, RecoverData(lambda epoch, seed: [], digits.loss, digits.accuracy))
    expected = "the training data gave 0 batches, of which 0 are held out: none to learn from."
    assert caught.value.message == expected
    assert caught.value.hint == "give smaller batches, or name data.validate in deploy.toml."


# --- hooks ---


def test_an_unknown_hook_is_named_with_its_near_miss(tmp_path):
    with pytest.raises(UsageError) as caught:
        run(tmp_path, spec=SPEC.model_copy(update={"hooks": ("l2-stort",)}))
    assert caught.value.message == "no hook named 'l2-stort'. Did you mean 'l2-start'?"


def test_the_l2_start_hook_keeps_weights_nearer_to_where_they_started(tmp_path):
    def distance(hooks: tuple[str, ...], **strengths: float) -> float:
        named = {name.replace("_", "-"): value for name, value in strengths.items()}
        spec = SPEC.model_copy(update={"hooks": hooks, "strengths": named})
        end = dict(run(tmp_path / f"{len(hooks)}{named}", spec=spec).module.named_parameters())
        moved = [(end[name] - p).detach() for name, p in digits.damaged().named_parameters() if p.ndim > 1]
        return sum(float(each.square().sum()) for each in moved)

    plain, pulled = distance(()), distance(("l2-start",))
    assert pulled < 0.98 * plain
    assert distance(("l2-start",), l2_start=0.01) == pulled, "its own strength"
    assert distance(("l2-start",), l2_start=1e-4) == pytest.approx(plain, rel=0.02)
    assert distance(("l2-start",), l2_start=0.1) < 0.8 * pulled


def test_a_resumed_recovery_with_a_hook_ends_as_one_that_was_not_stopped(tmp_path):
    spec = SPEC.model_copy(update={"hooks": ("l2-start",)})

    def interrupt(done: int, planned: int) -> None:
        if done == 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "torn", spec=spec, progress=interrupt)
    assert same(run(tmp_path / "torn", spec=spec).module, run(tmp_path / "whole", spec=spec).module)


# --- the latest instead of the best ---


def kept(tmp_path, scores, **kwargs):
    """A recovery whose epochs score so after a start of scores[0], and the networks that were scored."""
    validate, shown = scripted(scores)
    spec = SPEC.model_copy(update={"epochs": len(scores) - 1, "patience": 100})
    return run(tmp_path, RecoverData(digits.train, digits.loss, validate), spec, **kwargs), shown


@pytest.mark.parametrize(("scores", "epoch"), [([0.9, 0.95, 0.85], 1), ([0.9, 0.95, 0.7], 0), ([0.9, 0.7, 0.6], None)])
def test_with_an_allowed_drop_the_latest_epoch_within_it_is_kept(tmp_path, scores, epoch):
    recovered, shown = kept(tmp_path, scores, allowed_drop=0.1 + 1e-9)
    assert recovered.best_epoch == epoch
    assert recovered.best_score == (scores[0] if epoch is None else scores[epoch + 1])
    assert same(recovered.module, shown[0 if epoch is None else epoch + 1])


def test_without_an_allowed_drop_the_best_epoch_is_kept(tmp_path):
    recovered, shown = kept(tmp_path, [0.9, 0.95, 0.94])
    assert recovered.best_epoch == 0 and same(recovered.module, shown[1])


def test_a_checkpoint_of_another_way_of_keeping_is_not_gone_on_with(tmp_path):
    run(tmp_path)
    assert run(tmp_path).resumed_epochs == 3
    assert run(tmp_path, allowed_drop=math.inf).resumed_epochs == 0
