"""The README holds: its commands run as they stand, print what it shows, and its links lead somewhere."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


UNDECIDED = 4
"""Exit code of a measurement that a busy machine leaves open; a build is then tried again, from its cache."""


def blocks(kind: str) -> list[str]:
    """Fenced blocks of a language, in order."""
    return re.findall(rf"```{kind}\n(.*?)```", README, flags=re.S)


def commands() -> list[tuple[str, list[str]]]:
    """Every `$ …` line of the console blocks with the output lines shown under it."""
    found: list[tuple[str, list[str]]] = []
    for line in "".join(blocks("console")).splitlines():
        if line.startswith("$ "):
            found.append((line[2:].partition("  #")[0].strip(), []))
        elif line.strip():
            found[-1][1].append(line)
    return found


def first_words(lines: list[str]) -> list[str]:
    """What stays the same from machine to machine: the first word of each line."""
    return [line.split()[0] for line in lines if line.strip()]


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_commands_run_in_this_order_and_print_what_is_shown(tmp_path: Path):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    if not (ROOT / "examples" / "digits" / "digits.safetensors").is_file():  # as `make demo` does
        subprocess.run([sys.executable, str(ROOT / "examples" / "digits" / "train.py")], check=True, timeout=600)
    ran = 0
    for command, shown in commands():
        words = shlex.split(command)
        if words[0] != "deploy":
            continue
        begin = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from pipeline.cli import main; main()"
        for _ in range(3):
            done = subprocess.run(
                [sys.executable, "-c", begin, *words[1:]],
                cwd=tmp_path, capture_output=True, text=True, timeout=1500, check=False,
            )  # fmt: skip
            if words[1] != "build" or done.returncode != UNDECIDED:
                break
            shutil.rmtree(tmp_path / words[words.index("--out") + 1])
        if done.returncode == UNDECIDED:
            pytest.skip(f"this machine is too noisy for a verdict: {done.stdout[-300:]}")
        assert done.returncode == 0, f"$ {command}\n{done.stdout}\n{done.stderr}"
        if shown:
            told = iter(first_words(done.stdout.splitlines()))
            missing = [word for word in first_words(shown) if word not in told]  # in this order
            assert missing == [], f"$ {command}\n{done.stderr}{done.stdout}"
        ran += 1
    assert ran >= 6


def test_make_targets_that_it_names_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = [command.split()[1] for command, _ in commands() if command.startswith("make ")]
    assert named == ["demo", "test"]
    assert all(re.search(rf"^{name}:", makefile, flags=re.M) for name in named)


def test_the_project_file_it_shows_is_one_that_is_read(tmp_path: Path):
    from pipeline.project.schema import read_project_file

    [shown] = blocks("toml")
    assert tomllib.loads(shown)["version"] == 1
    (tmp_path / "deploy.toml").write_text(shown)
    assert read_project_file(tmp_path).data.evaluate == "data:evaluate"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_named_files_exist(page: Path):
    text = page.read_text(encoding="utf-8")
    missing = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if not (page.parent / link).exists()]
    named = re.findall(r"`((?:pipeline|targets|profiles|tests|docs|benchmarks|examples)/[\w/.-]+)`", text)
    missing += [name for name in named if "NAME" not in name and not (ROOT / name).exists()]
    assert missing == []


def test_options_that_it_names_exist():
    from pipeline.cli import app

    parameters = [parameter for command in app.commands.values() for parameter in command.params]
    known = {"--help", "--version"}.union(*(parameter.opts for parameter in parameters))
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    text = re.sub(r"`python -m benchmarks\.[^`]*`", "", text)  # they have options of their own
    assert sorted(set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) - known) == []


def test_files_of_a_bundle_that_it_lists_are_those_that_are_written():
    from pipeline.release.verify import REQUIRED

    section = README.split("## A bundle")[1].split("##")[0]
    listed = set(re.findall(r"`([\w.]+\.(?:onnx|json|html|txt|safetensors))`", section))
    assert listed == {*REQUIRED, "manifest.json", "pruned.safetensors"}


def test_it_fits_on_one_page():
    assert len(README.splitlines()) < 130
