"""What the shared nouns answer."""

import json
import math

from pipeline.nouns import AddBranch, DropBlock, KeepUnits, PruningPlan, Ranking, Sensitivity, Widen


def test_a_removed_unit_is_stood_in_for_by_the_first_twin_of_its_chain_that_stays():
    ranking = Ranking("g", (0, 1, 2, 3), (0.0, 0.1, 0.2, 0.3), twin=(1, 2, 3, -1))
    assert ranking.stand_ins([1, 2, 3]) == {0: 1}
    assert ranking.stand_ins([2, 3]) == {0: 2, 1: 2}
    assert ranking.stand_ins([3]) == {0: 3, 1: 3, 2: 3}
    assert ranking.stand_ins([0, 1, 2, 3]) == {}


def test_a_unit_without_a_twin_or_in_a_circle_of_twins_has_no_stand_in():
    assert Ranking("g", (0, 1, 2), (0.0, 0.1, 0.2), twin=(1, 0, -1)).stand_ins([2]) == {}
    assert Ranking("g", (0, 1, 2), (0.0, 0.1, 0.2)).stand_ins([2]) == {}


def test_a_ranking_comes_back_from_json_as_it_was():
    for ranking in (
        Ranking("g", (1, 0), (0.25, 1e-9), twin=(0, -1), merged="mean", weight=1.5),
        Ranking("h", (0,), (0.0,)),
    ):
        assert Ranking.from_table(json.loads(json.dumps(ranking.to_table()))) == ranking


def test_a_plan_keeps_what_the_network_grew_by_before_its_cuts():
    growth = (Widen("g", 24), AddBranch("cat_1", 16))
    plan = PruningPlan((*growth, KeepUnits("g", (0, 2)), DropBlock("b")))
    again = PruningPlan.from_json(plan.to_json())
    assert again == plan and again.growth == growth
    assert again.kept == {"g": (0, 2)} and again.dropped == {"b"}
    assert PruningPlan((KeepUnits("g", (0, 2)),)).growth == ()


def test_values_come_back_from_json_as_they_were_and_what_is_infinite_is_written_as_null():
    values = Sensitivity({"g": {8: math.inf, 16: 0.25, 32: 0.0}}, {"b": math.inf, "c": 0.5})
    text = json.dumps(values.to_table(), allow_nan=False)
    assert json.loads(text) == {"groups": {"g": [[8, None], [16, 0.25], [32, 0.0]]}, "blocks": {"b": None, "c": 0.5}}
    assert Sensitivity.from_table(json.loads(text)) == values


def test_infinite_values_made_finite_outweigh_all_others_at_every_width_that_may_be_chosen():
    values = Sensitivity({"g": {8: math.inf, 256: 0.0}, "h": {8: 5.0, 256: 0.0}}, {"b": math.inf})
    finite = values.finite({"g": (8, 16, 248, 256)})
    assert all(5.0 < value < math.inf for value in (*(finite.loss("g", w) for w in (8, 16, 248)), finite.blocks["b"]))
    assert finite.loss("g", 256) == 0.0 and finite.groups["h"] == values.groups["h"]
