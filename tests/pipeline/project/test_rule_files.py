"""Rule files that deploy.toml names: loaded as the project's other code is, and every mistake in one is a sentence."""

from __future__ import annotations

import pytest
from sample_project import NETS, TOML

from pipeline.project import load_project
from pipeline.prune.labels import LabelSpace, Op
from profiles.errors import DeployError, UsageError

NAMED = TOML.replace('factory = "nets:net"', 'factory = "nets:net"\nrules = "my_rules"')
RULES = """
KINDS = ("nets.Gate", "mylib::gate")


def apply(op, space):
    space.tensors[op.output] = space.tensors[op.inputs[0]]
"""


def test_a_rule_file_is_found_beside_deploy_toml_and_speaks_for_its_kinds(world):
    project = load_project(world(NAMED, my_rules=RULES))
    assert {kind: rule.file for kind, rule in project.rules.items()} == {
        "nets.Gate": "my_rules", "mylib::gate": "my_rules",
    }  # fmt: skip
    space, op = LabelSpace(), Op("gate", "nets.Gate", ("x",), "gate", ((1, 4),), (1, 4))
    space.tensors["x"] = "labels of x"  # type: ignore[assignment]
    project.rules["nets.Gate"].apply(op, space)
    assert space.tensors["gate"] == "labels of x"


def test_without_the_key_there_are_none(world):
    assert load_project(world()).rules == {}


def test_several_files_are_a_list_and_a_kind_has_one_rule(world):
    listed = NAMED.replace('rules = "my_rules"', 'rules = ["my_rules", "more.rules"]')
    folder = world(listed, my_rules=RULES)
    (folder / "more").mkdir()
    (folder / "more" / "rules.py").write_text(RULES.replace("nets.Gate", "nets.Other").replace("mylib", "yours"))
    assert list(load_project(folder).rules) == ["nets.Gate", "mylib::gate", "nets.Other", "yours::gate"]
    (folder / "more" / "rules.py").write_text(RULES)
    with pytest.raises(UsageError) as caught:
        load_project(folder)
    assert caught.value.message == (
        "deploy.toml: model.rules names 'my_rules' and 'more.rules', and both have a rule for 'nets.Gate'."
    )


def test_a_change_of_the_rules_changes_the_projects_digest(world):
    folder = world(NAMED, my_rules=RULES)
    before = load_project(folder).digest()
    (folder / "my_rules.py").write_text(RULES + "\n# another\n")
    assert load_project(folder).digest() != before


HAS = "deploy.toml: model.rules is 'my_rules', and my_rules.py has"


@pytest.mark.parametrize(
    ("rules", "sentence"),
    [
        ("def apply(op, space): ...", f"{HAS} no KINDS."),
        ("KINDS = 'nets.Gate'\ndef apply(op, space): ...", f"{HAS} KINDS that are no tuple of names."),
        ("KINDS = ()\ndef apply(op, space): ...", f"{HAS} KINDS that are no tuple of names."),
        ("KINDS = ('conv',)\ndef apply(op, space): ...", f"{HAS} 'conv' in KINDS, which names no operator of yours."),
        ("KINDS = (3,)\ndef apply(op, space): ...", f"{HAS} 3 in KINDS, which names no operator of yours."),
        ("KINDS = ('nets.Gate',)", f"{HAS} no function apply."),
        ("KINDS = ('nets.Gate',)\napply = 3", f"{HAS} an apply that is int."),
    ],
)
def test_a_file_that_is_no_rule_file_is_explained(world, rules, sentence):
    with pytest.raises(UsageError) as caught:
        load_project(world(NAMED, my_rules=rules))
    assert caught.value.message == sentence and caught.value.hint


def test_a_file_that_is_not_there_is_named_with_its_near_miss(world):
    folder = world(NAMED, my_rulez=RULES)
    with pytest.raises(UsageError) as caught:
        load_project(folder)
    expected = f"deploy.toml: model.rules is 'my_rules', and there is no module 'my_rules' in {folder}."
    assert caught.value.message == f"{expected} Did you mean 'my_rulez'?"


def test_a_name_that_is_no_module_is_refused(world):
    with pytest.raises(UsageError) as caught:
        load_project(world(NAMED.replace('"my_rules"', '"my-rules.py"')))
    assert caught.value.message == "deploy.toml: model.rules is 'my-rules.py', which is no name of a module."
    assert "without .py" in caught.value.hint


def test_a_file_that_fails_to_import_or_to_run_is_blamed_with_its_line(world):
    with pytest.raises(DeployError, match=r"importing the module 'my_rules' failed \(my_rules\.py, line 1\): ZeroDiv"):
        load_project(world(NAMED, my_rules="X = 1 / 0\n"))
    broken = load_project(world(NAMED, my_rules=RULES.replace("op.inputs[0]", "op.inputs[9]"), folder="other"))
    op = Op("gate", "nets.Gate", ("x",), "gate", ((1, 4),), (1, 4))
    with pytest.raises(DeployError) as caught:
        broken.rules["nets.Gate"].apply(op, LabelSpace())
    assert caught.value.message == (
        "the rule of my_rules for 'nets.Gate' failed (my_rules.py, line 6): IndexError: tuple index out of range"
    )


def test_a_rule_file_leaves_the_network_as_it_is(world):
    assert load_project(world(NAMED, nets=NETS, my_rules=RULES)).model()[0].out_channels == 4
