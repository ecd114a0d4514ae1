"""What no container runtime is needed to check: shell, Dockerfile, Compose file and workflow, by their own linters."""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from targets.jetson import JETPACKS

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "docker" / "nightly.sh"
DOCKERFILE = ROOT / "docker" / "build.Dockerfile"
BOARD = ROOT / "docker" / "jetson.Dockerfile"
COMPOSE = ROOT / "docker" / "compose.yaml"
WORKFLOW = ROOT / "examples" / "nightly" / "github-actions.yml"
YAML_STYLE = "{extends: default, rules: {line-length: {max: 120}, truthy: {check-keys: false}}}"

QUOTAS = {"cpus", "cpu_quota", "cpu_period", "cpu_percent", "cpu_shares", "cpu_count", "mem_limit", "deploy"}
"""Keys of a Compose service that limit how much of a core it gets, or may hide such a limit."""

LINTERS = {
    "shellcheck": ["--shell=bash", "--severity=style"],
    "hadolint": ["--failure-threshold=info", "--no-color"],
    "yamllint": ["--strict", "-d", YAML_STYLE],
    "compose": ["--builtin-schema", "vendor.compose-spec"],
    "workflow": ["--builtin-schema", "vendor.github-workflows"],
}


def lint(name: str, file: Path) -> str:
    """What a linter of the `dev` packages says of a file; "" when it is content."""
    program = name if name in ("shellcheck", "hadolint", "yamllint") else "check-jsonschema"
    found = shutil.which(program, path=str(Path(sys.executable).parent)) or shutil.which(program)
    if found is None:
        pytest.skip(f"{program} is not installed: pip install '.[dev]'")
    done = subprocess.run([found, *LINTERS[name], str(file)], capture_output=True, text=True, timeout=120, check=False)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def read(file: Path) -> dict[Any, Any]:
    """A YAML file with one table."""
    table = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert isinstance(table, dict)
    return table


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions, with continued lines joined and comments left out."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(encoding="utf-8"), flags=re.M).replace("\\\n", " ")
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in text.splitlines() if line.strip()]


def argument(name: str) -> str:
    """Default of a build argument."""
    defaults = dict(rest.split("=", 1) for word, rest in instructions() if word == "ARG")
    return defaults[name]


# --- linters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("shellcheck", SCRIPT),
        ("hadolint", DOCKERFILE),
        ("hadolint", BOARD),
        ("yamllint", COMPOSE),
        ("yamllint", WORKFLOW),
        ("compose", COMPOSE),
        ("workflow", WORKFLOW),
    ],
    ids=lambda value: value.name if isinstance(value, Path) else value,
)
def test_a_linter_is_content(name: str, file: Path):
    assert lint(name, file) == ""


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("shellcheck", "#!/bin/bash\nrm -rf $1/x\n", "SC2086"),
        ("hadolint", "FROM python\nRUN pip install torch\n", "DL3006"),
        ("yamllint", "---\na: 1\na: 2\n", "duplication"),
        ("compose", "services:\n  build:\n    cpu_set: 0\n", "cpu_set"),
        ("workflow", "on: push\njobs:\n  check:\n    run-on: x\n", "run-on"),
    ],
)
def test_a_linter_sees_a_mistake(name: str, text: str, said: str, tmp_path: Path):
    file = tmp_path / ("Dockerfile" if name == "hadolint" else "file.yaml")
    file.write_text(text)
    assert said in lint(name, file)


def test_the_shell_inside_the_workflow_is_clean_too(tmp_path: Path):
    steps = read(WORKFLOW)["jobs"]["check"]["steps"]
    scripts = [step["run"] for step in steps if "run" in step]
    assert len(scripts) >= 2
    for index, script in enumerate(scripts):
        file = tmp_path / f"{index}.sh"
        file.write_text(f"#!/bin/bash -e\n{script}\n")
        assert lint("shellcheck", file) == ""


# --- the board's image -----------------------------------------------------------------------------------------------


def test_the_boards_image_has_a_stage_of_each_jetpack_that_is_known():
    text = BOARD.read_text(encoding="utf-8")
    stages = dict(re.findall(r"^FROM (\S+:\S+) AS jetpack(\d+)$", text, flags=re.M))
    assert set(stages.values()) == {version.split(".")[0] for version in JETPACKS.values()}
    [default] = re.findall(r"^ARG JETPACK=(\d+)$", text, flags=re.M)
    assert default in stages.values() and "ARG BASE=jetpack${JETPACK}\n" in text
    assert re.findall(r"^FROM (\$\S+)$", text, flags=re.M) == ["${BASE}"], "the last stage is what is built"


def test_the_boards_user_takes_the_place_of_one_with_its_id(tmp_path: Path):
    """As on Ubuntu 24.04, whose images have a user 1000. The Dockerfile's own line, over stand-ins that note."""
    [line] = re.findall(r"^    && (if taken=.*; fi) \\$", BOARD.read_text(encoding="utf-8"), flags=re.M)
    for name, answer in (
        ("getent", '[ "$2" != 1000 ] && exit 2; echo ubuntu:x:1000:1000::/home/ubuntu:'),
        ("userdel", ""),
    ):
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@" >>"{tmp_path}/done"\n{answer}\n')
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for uid, removed in (("1000", ["userdel --remove ubuntu"]), ("2000", [])):
        (tmp_path / "done").write_text("")
        subprocess.run(["/bin/sh", "-e", "-c", line], env={**env, "UID": uid}, check=True, timeout=60)
        done = (tmp_path / "done").read_text().splitlines()
        assert [each for each in done if each.startswith("userdel")] == removed


def test_pip_may_install_where_the_system_keeps_its_packages_to_itself():
    assert re.search(r"^ENV PIP_BREAK_SYSTEM_PACKAGES=1$", BOARD.read_text(encoding="utf-8"), flags=re.M)


# --- the image -------------------------------------------------------------------------------------------------------


def test_the_image_has_the_torch_that_make_has():
    [pinned] = re.findall(r"^TORCH\s*\?=\s*(\S+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M)
    assert argument("TORCH") == pinned
    assert read(COMPOSE)["x-image"]["build"]["args"]["TORCH"] == f"${{DEPLOY_TORCH:-{pinned}}}"


def test_its_base_is_pinned_to_a_patch_release_that_the_project_supports():
    bases = {rest.split()[0] for word, rest in instructions() if word == "FROM"}
    [(major, minor)] = {re.fullmatch(r"python:(\d+)\.(\d+)\.\d+-slim-\w+", base).groups() for base in bases}  # type: ignore[union-attr]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    least = project["requires-python"].removeprefix(">=")
    assert (int(major), int(minor)) >= tuple(map(int, least.split(".")))


def test_it_runs_as_nobody_special_and_is_healthy_when_deploy_starts():
    words = dict(instructions())
    assert words["USER"] == "${UID}" and int(argument("UID")) >= 1000
    assert words["HEALTHCHECK"].endswith('CMD ["deploy", "--version"]')
    assert words["VOLUME"] == '["/work/.deploy", "/work/runs"]'


def test_what_it_copies_is_there_and_passes_the_ignore_file():
    lines = (ROOT / "docker" / "build.Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*", "nothing passes but what is named"
    passed = {rule.removeprefix("!") for rule in rules if rule.startswith("!")}
    copied = {
        source
        for word, rest in instructions()
        if word == "COPY" and "--from" not in rest
        for source in [part for part in rest.split() if not part.startswith("--")][:-1]
    }
    assert copied == passed
    assert [name for name in copied if not (ROOT / name).exists()] == []


def test_it_gets_everything_that_the_package_is_made_of():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    copied = " ".join(rest for word, rest in instructions() if word == "COPY")
    needed = {settings["project"]["readme"], *settings["project"]["license-files"], "pyproject.toml"}
    patterns = settings["tool"]["setuptools"]["packages"]["find"]["include"]
    folders = [path.parent.name for path in ROOT.glob("*/__init__.py")]
    needed |= {name for name in folders if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)}
    assert len(needed) >= 6 and [name for name in sorted(needed) if name not in copied.split()] == []


# --- the services ----------------------------------------------------------------------------------------------------


def test_both_services_get_whole_cores_and_the_hosts_lease():
    services = read(COMPOSE)["services"]
    assert sorted(services) == ["build", "nightly"]
    for service in services.values():
        assert service["cpuset"] and not QUOTAS & set(service)
        assert service["init"] is True and service["healthcheck"] == {"disable": True}
        assert "/run/lock:/run/lock" in service["volumes"]
        inside = {volume.rpartition("}")[2].split(":")[1] for volume in service["volumes"]}
        assert {"/work/.deploy", "/work/runs"} <= inside
        assert service["profiles"], "without a profile `compose up` would start both, beside one another"


def test_the_container_is_stopped_later_than_a_check_that_does_not_listen():
    [grace] = re.findall(r"^readonly GRACE_S=(\d+)", SCRIPT.read_text(encoding="utf-8"), flags=re.M)
    stop = read(COMPOSE)["services"]["nightly"]["stop_grace_period"]
    assert int(stop.removesuffix("s")) >= int(grace) + 10


def test_the_nightly_service_runs_the_script_of_the_image_with_options_that_it_has():
    command = read(COMPOSE)["services"]["nightly"]["command"]
    assert any(word == "COPY" and rest.endswith(f"docker/{command[0]} /usr/local/bin/{command[0]}")
               for word, rest in instructions())  # fmt: skip
    shown = subprocess.run([SCRIPT, "--help"], capture_output=True, text=True, check=True).stdout
    assert [word for word in command if word.startswith("--") and word not in shown] == []


def test_the_build_service_asks_what_deploy_build_knows():
    from pipeline.cli import app

    command = read(COMPOSE)["services"]["build"]["command"]
    assert command[0] == "deploy"
    known = {option for parameter in app.commands[command[1]].params for option in parameter.opts}
    assert {word.partition("=")[0] for word in command[2:]} <= known


# --- the workflow ----------------------------------------------------------------------------------------------------


def test_the_workflow_is_an_example_and_does_not_run_here():
    assert ".github" not in WORKFLOW.parts and not list((ROOT / ".github" / "workflows").glob("nightly.y*ml"))


def test_the_workflow_runs_one_check_at_a_time_on_a_runner_with_the_device():
    table = read(WORKFLOW)
    assert set(table[True]) == {"schedule", "workflow_dispatch"}, "YAML 1.1 reads the key `on` as true"
    assert table["concurrency"]["cancel-in-progress"] is False and table["permissions"] == {}
    assert table["jobs"]["check"]["runs-on"][0] == "self-hosted"
    assert table["jobs"]["check"]["timeout-minutes"]


def test_the_workflow_restores_no_number_and_needs_no_secret():
    steps = read(WORKFLOW)["jobs"]["check"]["steps"]
    used = [step["uses"] for step in steps if "uses" in step]
    assert all(re.fullmatch(r"actions/upload-artifact@[0-9a-f]{40}", action) for action in used)
    assert "secrets." not in WORKFLOW.read_text(encoding="utf-8")


def test_the_workflow_keeps_reports_and_junit_whatever_the_verdict_was():
    steps = read(WORKFLOW)["jobs"]["check"]["steps"]
    kept = [step for step in steps if "uses" in step]
    assert all(step["if"] == "always()" and step["with"]["retention-days"] > 0 for step in kept)
    assert any(step["with"]["path"].endswith("junit.xml") for step in kept)


# --- the page --------------------------------------------------------------------------------------------------------


def test_the_page_names_files_and_options_that_exist():
    page = (ROOT / "docker" / "README.md").read_text(encoding="utf-8")
    shown = subprocess.run([SCRIPT, "--help"], capture_output=True, text=True, check=True).stdout
    for file in re.findall(r"\]\(([^)#:]+)\)", page):
        assert (ROOT / "docker" / file).exists(), file
    for script_call in re.findall(r"nightly\.sh ([^`\n]*)", page):
        assert [word for word in re.findall(r"--[a-z]+", script_call) if word not in f"{shown} --help"] == []
    compose = COMPOSE.read_text(encoding="utf-8")
    assert [name for name in set(re.findall(r"DEPLOY_[A-Z_]+", page)) if f"${{{name}:-" not in compose] == []


def test_the_boards_sshd_needs_no_root_takes_its_configuration_and_lets_in_keys_only():
    sshd = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if sshd is None:
        pytest.skip("sshd is not installed: apt-get install openssh-server")
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        folder, user = Path(name), 65534 if os.geteuid() == 0 else None
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "host"], check=True)
        text = BOARD.with_name("jetson.sshd_config").read_text().replace("/keys/host", str(folder / "host"))
        (folder / "config").write_text(text)
        if user is not None:
            for path in (folder, folder / "host"):
                os.chown(path, user, user)
        done = subprocess.run(
            [sshd, "-T", "-f", folder / "config"], capture_output=True, text=True, check=False, user=user
        )
    assert done.returncode == 0, done.stderr
    told = set(done.stdout.splitlines())
    assert {"port 2222", "passwordauthentication no", "permitrootlogin no", "allowusers deploy"} <= told
