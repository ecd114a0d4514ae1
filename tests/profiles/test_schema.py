"""Profiles: what is read, what is refused, and in which words."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from profiles.errors import UsageError
from profiles.schema import Budget, MeasureSpec, Profile, keys, load_profile, profile_names, read_toml


def write(folder: Path, text: str, name: str = "mine.toml") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def refusal(*arguments, **named) -> str:
    with pytest.raises(UsageError) as error:
        load_profile(*arguments, **named)
    assert error.value.exit_code == 2
    return str(error.value)


@pytest.mark.parametrize(
    ("text", "limit_ms", "ratio", "percentile", "again"),
    [
        ("8ms", 8.0, None, "p50", "8ms"),
        ("0.5x", None, 0.5, "p50", "0.5x"),
        (" .35 x@p90 ", None, 0.35, "p90", "0.35x@p90"),
        ("250us@p99", 0.25, None, "p99", "0.25ms@p99"),
        ("0.01s @ mean", 10.0, None, "mean", "10ms@mean"),
        ("1e1ms", 10.0, None, "p50", "10ms"),
    ],
)
def test_a_budget_is_read_from_its_text_and_written_back(text, limit_ms, ratio, percentile, again):
    budget = Budget.parse(text)
    assert (budget.limit_ms, budget.ratio, budget.percentile) == (limit_ms, ratio, percentile)
    assert str(budget) == again
    assert Budget.parse(str(budget)) == budget


@pytest.mark.parametrize("text", ["", "fast", "8", "ms", "-1ms", "8 kg", "0.5x@", "x"])
def test_what_is_no_latency_is_refused_as_a_budget(text):
    with pytest.raises(UsageError) as error:
        Budget.parse(text)
    assert str(error.value) == f"budget '{text}' is not a latency.\nwrite it like 8ms, 0.5x or 0.5x@p90."


@pytest.mark.parametrize("text", ["0ms", "0x", "0.0x@p90"])
def test_a_budget_of_zero_is_refused(text):
    with pytest.raises(UsageError) as error:
        Budget.parse(text)
    assert str(error.value) == f"budget '{text}' must be above zero.\nwrite it like 8ms or 0.5x."


def test_an_unknown_percentile_of_a_budget_names_the_near_miss():
    with pytest.raises(UsageError) as error:
        Budget.parse("0.5x@p95")
    assert str(error.value) == "budget '0.5x@p95' names the percentile 'p95'. Did you mean 'p99'?"


@pytest.mark.parametrize("name", profile_names())
def test_every_profile_that_comes_with_the_product_loads_under_its_own_name(name):
    profile = load_profile(name)
    assert profile.name == name
    assert Profile.model_validate(profile.model_dump()) == profile


def test_a_profile_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        load_profile("local").measure.threads = 4


def test_a_users_profile_extends_another_and_overrides_come_last(tmp_path):
    path = write(tmp_path, 'extends = "local"\nbudget = "0.5x"\n[measure]\nthreads = 2\n[prune]\nrounds = 2\n')
    profile = load_profile(path, {"prune": {"rounds": 3}})
    assert (profile.name, profile.target, profile.runtime) == ("mine", "local", "ort")
    assert (profile.measure.threads, profile.prune.rounds) == (2, 3)
    assert profile.measure.accept_rounds == MeasureSpec().accept_rounds
    assert profile.budget == Budget(ratio=0.5)


def test_an_unknown_profile_names_its_near_miss():
    assert refusal("locl") == "no target named 'locl'. Did you mean 'local'?\ndeploy list profiles"


def test_a_profile_file_that_is_not_there_is_named():
    assert refusal("/no/such.toml") == "there is no profile file '/no/such.toml'.\ndeploy list profiles"


def test_profiles_that_extend_each_other_in_a_circle_are_refused(tmp_path):
    one, two = tmp_path / "one.toml", tmp_path / "two.toml"
    one.write_text(f'extends = "{two}"')
    two.write_text(f'extends = "{one}"')
    assert refusal(str(one)) == f"profiles extend each other in a circle: {one} -> {two} -> {one}."


def test_an_unknown_key_names_its_table_and_its_near_miss(tmp_path):
    path = write(tmp_path, 'extends = "local"\n[measure]\nthread = 2\n')
    assert refusal(path) == f"{path}: no key named 'measure.thread'. Did you mean 'threads'?"


def test_an_unknown_key_that_is_near_to_none_lists_all(tmp_path):
    path = write(tmp_path, 'extends = "local"\n[graph]\nzzz = 2\n')
    assert refusal(path) == f"{path}: no key named 'graph.zzz'. Known: candidates, hash_error, opset, passes."


def test_an_unknown_key_at_the_top_is_named(tmp_path):
    path = write(tmp_path, 'extends = "local"\nbuget = "8ms"\n')
    assert refusal(path) == f"{path}: no key named 'buget'. Did you mean 'budget'?"


def test_an_unknown_key_of_the_budget_table_is_named(tmp_path):
    path = write(tmp_path, 'extends = "local"\n[budget]\nlimitms = 8.0\n')
    assert refusal(path) == f"{path}: no key named 'budget.limitms'. Did you mean 'limit_ms'?"


def test_a_missing_key_is_named_with_what_to_add(tmp_path):
    path = write(tmp_path, 'runtime = "ort"\n')
    assert refusal(path) == f"{path}: the key 'target' is missing.\nadd 'target = …' to {path}."


def test_a_value_out_of_range_is_named_with_the_value(tmp_path):
    path = write(tmp_path, 'extends = "local"\n[measure]\nthreads = 0\n')
    assert refusal(path) == f"{path}: measure.threads is 0, a value; input should be greater than or equal to 1."


@pytest.mark.parametrize(
    ("table", "key"),
    [("measure", "paced_ms"), ("measure", "sustained_s"), ("check", "fail"), ("check", "max_seconds")],
)
@pytest.mark.parametrize("value", ["inf", "nan"])
def test_a_number_that_is_not_finite_is_refused(tmp_path, table, key, value):
    path = write(tmp_path, f'extends = "local"\n[{table}]\n{key} = {value}\n')
    assert refusal(path) == f"{path}: {table}.{key} is {value}, a value; input should be a finite number."
    assert "input should be a finite number" in refusal("local", {table: {key: float(value)}})


def test_a_budget_without_end_is_refused():
    with pytest.raises(UsageError) as error:
        Budget.parse("1e999ms")
    assert str(error.value).startswith("budget '1e999ms' is not a latency.")


@pytest.mark.parametrize("key", ["warn", "fail_low"])
def test_a_check_that_would_fail_before_it_warns_is_refused(tmp_path, key):
    path = write(tmp_path, f'extends = "local"\n[check]\nfail = 0.03\n{key} = 0.04\n')
    assert refusal(path) == f"{path}: check.{key} is 0.04, above fail, which is 0.03; lower it or raise fail."
    equal = {"warn": 0.02, "fail_low": 0.02, "fail": 0.02}
    assert load_profile("local", {"check": equal}).check.warn == 0.02


def test_a_precision_is_one_of_those_there_are_and_float32_unless_asked(tmp_path):
    path = write(tmp_path, 'extends = "local"\nprecision = "fp16"\n')
    assert (load_profile("local").precision, load_profile(path).precision) == ("fp32", "fp16")
    assert refusal("local", {"precision": "half"}) == (
        "the command line: precision is 'half', a string; input should be 'fp32' or 'fp16'."
    )


def test_a_text_where_a_number_belongs_is_called_a_string(tmp_path):
    path = write(tmp_path, 'extends = "local"\n[measure]\nthreads = "many"\n')
    assert refusal(path).startswith(f"{path}: measure.threads is 'many', a string; input should be a valid integer")


def test_overrides_are_checked_like_the_file_and_blamed_where_they_are_wrong(tmp_path):
    assert refusal("local", {"prune": {"criterium": "x"}}) == (
        "the command line: no key named 'prune.criterium'. Did you mean 'criterion'?"
    )
    path = write(tmp_path, 'extends = "local"\n[prune]\nrounds = 0\n')
    assert refusal(path, {"prune": {"seed": 1}}).startswith(f"{path}: prune.rounds is 0")
    assert refusal(path, {"prune": 3}).startswith("the command line: prune is 3")


def test_what_a_profile_extends_in_vain_is_told_with_the_file(tmp_path):
    path = write(tmp_path, 'extends = "jetson-orin-nan"\n')
    found = "there is no target named 'jetson-orin-nan'. Did you mean 'jetson-orin-nano'?"
    assert refusal(path) == f"{path} extends 'jetson-orin-nan', and {found}\ndeploy list profiles"


def test_every_key_is_listed_with_its_default_and_what_it_means():
    found = dict(keys(Profile))
    assert found["prune.slack"] == "0.03  largest part of the budget that may stay unused"
    assert found["measure.paced_ms"].startswith("control period")
    assert found["graph.passes"].startswith('["fold-constants", ')
    assert found["measure.spin"].startswith("false  ") and found["ssh.options"].startswith("{}  ")
    assert all(about.strip("0123456789. []{}") for about in found.values())
    tables = {key.split(".")[0] for key in found if "." in key}
    assert tables == {n for n, f in Profile.model_fields.items() if isinstance(f.default, BaseModel)}


def test_a_file_that_is_no_toml_says_where(tmp_path):
    path = write(tmp_path, "target = \n")
    assert refusal(path) == f"{path} is not valid TOML: Invalid value (at line 1, column 10)."
    Path(path).write_bytes(b"\xff\xfe\x00")
    assert refusal(path).startswith(f"{path} is not valid TOML: 'utf-8' codec can't decode")


def test_reading_a_missing_toml_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError) as error:
        read_toml(tmp_path / "gone.toml")
    assert str(error.value) == f"there is no file '{tmp_path}/gone.toml'."
