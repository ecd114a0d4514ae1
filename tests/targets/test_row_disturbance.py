"""Rows of the latency table: measured again where the device was disturbed, and no result where it stays so."""

from __future__ import annotations

import pytest

from profiles.schema import MeasureSpec
from targets.harness import bench
from targets.harness.agent.board import model as model_part
from targets.harness.agent.board import rows, worker
from targets.harness.agent.board.base import AgentError


@pytest.fixture
def counter(tmp_path, monkeypatch):
    """An over-current counter, the only throttle counter that there is."""
    path = tmp_path / "hwmon3" / "oc3_event_cnt"
    path.parent.mkdir()
    path.write_text("15\n")
    monkeypatch.setattr(worker, "throttle_paths", lambda: [str(path)])
    return path


@pytest.fixture
def measured(conv, tmp_path, monkeypatch):
    """Measures two models; `disturb` is told at each block how many there were before."""

    def measure(disturb):
        count = iter(range(1 << 30))

        class Disturbed(model_part.Model):
            def block(self, dropped, timed):
                disturb(next(count))
                return super().block(dropped, timed)

        monkeypatch.setattr(rows, "open_model", Disturbed)
        models, spec = [conv("a", layers=1), conv("b", layers=3)], MeasureSpec()
        job = bench.rows_job(models, conv("dense"), 4, spec, ("CPUExecutionProvider",))
        return rows.rows(job, str(tmp_path))

    return measure


BLOCKS = (2 + bench.REFERENCE_SESSIONS) * 6
"""Of one try: one that finds out how many inferences make a block, one that does not count, and four rounds."""


def test_rows_that_nothing_disturbs_are_measured_once(counter, measured):
    seen: list[int] = []
    found = measured(seen.append)
    assert found["again"] == [] and [len(row) for row in found["rows"]] == [4, 4] and len(seen) == BLOCKS


def test_rows_under_over_current_are_measured_again(counter, measured):
    seen: list[int] = []

    def overload(block):
        seen.append(block)
        if block in (20, 25):
            counter.write_text(f"{block}\n")

    found = measured(overload)
    assert found["again"] == ["the board's power supply was overloaded 10 times meanwhile"]
    assert [len(row) for row in found["rows"]] == [4, 4] and len(found["reference"]) == 1
    assert len(seen) == 2 * BLOCKS


def test_over_current_that_goes_on_ends_the_rows_without_a_result(counter, measured):
    with pytest.raises(AgentError, match="overloaded 42 times meanwhile, 3 times in a row") as error:
        measured(lambda block: counter.write_text(f"{block + 16}\n"))
    said = bench.mendable(error.value.to_table(), {}, "1")
    assert said.exit_code == 4 and said.message.startswith("rows of the latency table are no result: the board's power")


def test_a_counter_that_cannot_be_read_says_nothing(counter, measured):
    assert measured(lambda block: counter.write_text("" if block > 9 else "15\n"))["again"] == []


def readings(clocks=(), throttle=()):
    """One reading of a watch for each value; the counter is a processor's, no over-current's."""
    length = max(len(clocks), len(throttle))
    pairs = zip(clocks or [1000] * length, throttle or [0] * length, strict=True)
    return [{"throttle": {"/sys/cpu0": n}, "khz": [khz], "gpu_khz": []} for khz, n in pairs]


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (readings(clocks=[1000] * 11), ""),
        (readings(clocks=[1000] * 5 + [980] + [1000] * 5), ""),
        (readings(clocks=[1000] * 5 + [980] * 2 + [1000] * 4), "a held clock moved"),
        (readings(throttle=[0] * 4 + [1] * 3 + [2] * 4), ""),
        (readings(throttle=[0] * 4 + [1, 2, 3] + [3] * 4), "a throttle counter moved again and again"),
    ],
)
def test_up_to_a_fifth_of_the_stretches_may_be_disturbed_as_of_a_sessions_blocks(found, why):
    assert rows.disturbance(found) == why
