"""Reports: the same numbers as a table, as JSON and as a page that fetches nothing and runs nothing."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import browser
import pytest
from rich.console import Console
from test_check_report import sealed

from pipeline.report import numbers, text
from pipeline.report.data import (
    BlockRow,
    Distribution,
    Figures,
    GroupRow,
    PassRow,
    PointRow,
    RepairRow,
    ReportData,
    RoundRow,
    SiteRow,
    StageRow,
    summary,
)
from pipeline.report.document import render

BARE = ReportData(
    network="nets:tiny", target="local", budget="0.5x", budget_ms=0.4, verdict="met",
    dense=Figures(0.98, 272_474, 40_551_000, 0.806, 0.811, (0.806, 0.816)),
    pruned=Figures(0.976, 121_003, 14_211_000, 0.399, 0.396, (0.393, 0.399)),
)  # fmt: skip
FULL = replace(
    BARE,
    metric="accuracy", reason="p50 is 0.488x of 'dense'", run="runs/r", bundle="runs/r/bundle", max_drop=0.01,
    ratio=0.488, ratio_interval=(0.485, 0.492), process_ratios=(0.487, 0.489, 0.488), seconds=143.2,
    groups=(
        GroupRow("layer1 stream", 16, 16, "layer1", "it is an output of the network"),
        GroupRow("layer1.0.conv1", 16, 4, "layer1"), GroupRow("layer2.0.conv1", 32, 0, "layer2", dropped=True),
    ),
    blocks=(BlockRow("layer2.0", True), BlockRow("layer1.0", False, "its shortcut changes the shape")),
    leaves=(("pool", "kept whole"),),
    sites=(SiteRow("layer1.0", "residual block", 0.09, 0.03), SiteRow("layer2.0", "residual block", 0.08, 0.0)),
    rounds=(RoundRow(1, 0.40, 0.01, 0.43, (0.42, float("inf")), said="table corrected"), RoundRow(2, 0.40, 0.01, None)),
    points=(PointRow("dense", 0.81, 0.98), PointRow("ruined", 0.39, 0.1), PointRow("round 2", 0.396, 0.976, 0.08, True),
            PointRow("round 1", 0.43, None, 0.06)),
    distributions=(
        Distribution("dense", {"p50": 0.81, "mean": 0.82, "p90": 0.85, "p99": None}, {"p50": 0.82}, (0.8, 0.81), 2),
        Distribution("pruned", {"p50": 0.39, "mean": 0.40, "p90": 0.41, "p99": 0.5}, {}, (0.39, 0.4, 0.41), 3),
    ),
    repairs=(RepairRow("none", 2.3, 0.42, 0.0), RepairRow("least-squares", 0.08, None, 3.1, True)),
    passes=(PassRow("merge-pads", 2, ("Pad_3: its value is not zero",)),),
    stages=(StageRow("tabulate", 18.2, "reused 41, measured 3"),),
    conditions={"cpu": "a processor"}, versions={"onnx": "1.18"}, settings={"solver": "exact"},
    notes=("the clock floats.",),
)  # fmt: skip


def test_a_dry_run_is_told_with_its_groups_blocks_and_prediction():
    groups = {
        "layer1.conv1": {"width": 16, "kept": 9, "frozen": None},
        "head": {"width": 10, "kept": 10, "frozen": "it is the [output]"},
    }
    found = {"groups": groups, "removed_blocks": [], "predicted_ratio": 0.4871, "budget_ratio": 0.5, "table_rows": 41}
    console = Console(file=io.StringIO(), width=120)
    text.show_dry(found, console)
    lines = [line.split() for line in console.file.getvalue().splitlines()]
    assert ["layer1.conv1", "16", "9"] in lines and ["head", "10", "10", "it", "is", "the", "[output]"] in lines
    assert console.file.getvalue().endswith(
        "removed blocks: none\npredicted 0.487x of dense, budget 0.500x, 41 table rows\n"
    )


def test_a_report_comes_back_from_its_json_as_it_was():
    for data in (BARE, FULL):
        assert ReportData.from_json(data.to_json()) == data
        json.loads(data.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@pytest.mark.parametrize("bad", ["[]", "{}", '{"network": 1, "colour": 2}', "nonsense", '{"dense": {"speed": 1}}'])
def test_what_is_no_report_is_a_value_error(bad: str):
    with pytest.raises(ValueError, match=r"not the data of a report|Expecting value"):
        ReportData.from_json(bad)


def test_the_summary_holds_what_build_promises():
    told = summary(FULL)
    assert {"bundle", "budget_ms", "dense_ms", "measured_ms", "latency_ratio", "accuracy_dense", "accuracy", "rounds",
            "seconds"} <= told.keys()  # fmt: skip
    assert told["latency_ratio"] == 0.488 and told["rounds"] == 2 and told["bundle"] == "runs/r/bundle"
    unbounded = replace(FULL, ratio_interval=(0.4, float("inf")))
    assert json.loads(json.dumps(summary(unbounded), allow_nan=False))["latency_ratio_interval"] == [0.4, None]


def _shown(data: ReportData) -> str:
    console = Console(file=io.StringIO(), width=120)
    text.show(data, console)
    return console.file.getvalue()


def test_the_closing_table_sets_dense_beside_pruned():
    lines = [line.split() for line in _shown(FULL).splitlines()]
    assert lines[0] == ["dense", "pruned", "change"]
    assert ["accuracy", "0.98", "0.976", "−0.004"] in lines
    assert ["parameters", "272", "k", "121", "k", "−55.6", "%"] in lines
    assert ["MACs", "40.6", "M", "14.2", "M", "−65.0", "%"] in lines
    assert ["predicted", "0.806", "ms", "0.399", "ms", "0.495x"] in lines
    assert ["measured,", "p50", "0.811", "ms", "0.396", "ms", "0.488x"] in lines
    assert "0.393 to 0.399 ms" in _shown(FULL) and "0.485 to 0.492x" in _shown(FULL)
    assert ["budget", "0.400", "ms", "0.5x"] in lines
    assert _shown(FULL).splitlines()[-1] == "bundle  runs/r/bundle"


def test_what_was_not_measured_is_not_made_up():
    missing = replace(BARE, pruned=Figures(None, 121_003, 14_211_000), verdict="undecided", bundle="runs/r/rejected")
    shown = _shown(missing)
    assert "–" in shown and "undecided" in shown and "nearest point  runs/r/rejected" in shown
    assert "not measured" in render(missing)


@pytest.mark.parametrize(
    ("value", "written"), [(0, "0"), (482, "482"), (121_003, "121 k"), (40_551_000, "40.6 M"), (1.82e9, "1.82 G")]
)
def test_large_counts_are_short(value: float, written: str):
    assert numbers.count(value) == written


def test_a_bound_that_does_not_exist_is_said_so():
    assert numbers.bounds((0.4, float("inf"))) == "0.400 to no upper bound ms"
    assert numbers.ms(None) == "not measured" and numbers.seconds(143.2) == "2 min 23 s"
    assert [numbers.fact(value) for value in ("", "None", "ab" * 32, "1.31")] == ["–", "none", "abababababab…", "1.31"]


@pytest.fixture(scope="module")
def html() -> str:
    return render(FULL)


def test_the_page_is_one_well_formed_file_that_fetches_and_runs_nothing(html: str):
    sealed(html)


def test_the_page_shows_every_part_of_the_data(html: str):
    for part in ("layer1 stream", "solver", "it is an output of the network", "residual block", "table corrected",
                 "least-squares (chosen)", "Pad_3: its value is not zero", "reused 41, measured 3", "a processor",
                 "the clock floats.", "its shortcut changes the shape", "kept whole", "too few samples",
                 "32 → removed", "0.485 to 0.492x"):  # fmt: skip
        assert part in html, part
    assert html.count("<svg") == 5


def test_a_page_of_bare_figures_has_no_empty_sections():
    html = render(BARE)
    assert "<svg" not in html and html.count("<section>") == 1


def test_names_from_the_network_are_text_and_never_markup():
    bad = "<script>alert(1)</script>"
    data = replace(FULL, network=bad, metric=bad, groups=(GroupRow(bad, 4, 2, bad, bad),), notes=(bad,), reason=bad,
                   points=(PointRow(bad, 0.4, 0.9), PointRow("dense", 0.8, 0.98)),
                   distributions=(replace(FULL.distributions[0], name=bad),))  # fmt: skip
    told = render(data)
    assert bad not in told and "&lt;script&gt;" in told


def test_the_same_data_give_the_same_page(html: str):
    assert render(FULL) == html


def test_a_resumed_run_reports_the_same_once_its_times_are_left_out():
    later = replace(FULL, seconds=999.0, stages=(StageRow("tabulate", 0.1, "reused 44"),),
                    repairs=tuple(replace(row, seconds=9.0) for row in FULL.repairs))  # fmt: skip
    assert later != FULL and later.timeless() == FULL.timeless()
    assert "reused 41" not in render(FULL.timeless())


@browser.needed
@pytest.mark.parametrize("width", [380, 1100])
def test_a_real_browser_shows_the_page_without_sideways_scrolling(tmp_path: Path, html: str, width: int):
    inner, scrolled = browser.widths(tmp_path, html, width)
    assert inner == width and scrolled <= inner
