"""What the shared nouns answer."""

import json

from pipeline.nouns import AddBranch, DropBlock, KeepUnits, PruningPlan, Ranking, Widen


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
