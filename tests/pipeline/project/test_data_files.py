"""`data.files`: what tells a build that the data it judged and trained on is no longer the same."""

import os
from pathlib import Path

import pytest
from sample_project import TOML

from pipeline import demands
from pipeline.project import load_project
from profiles.errors import UsageError
from profiles.schema import load_profile


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of data beside the project."""
    folder = tmp_path / "images"
    (folder / "signs").mkdir(parents=True)
    (folder / "signs" / "1.png").write_bytes(b"one")
    (folder / "labels").write_bytes(b"1")
    return folder


def data(world, named: str) -> str | None:
    return load_project(world(TOML + named)).data


def test_nothing_is_known_of_data_that_nobody_names(world):
    assert data(world, "") is None


def test_nothing_has_to_be_known_where_only_calibration_samples_are_read(world):
    text = TOML.replace('evaluate = "data:evaluate"\n', "")
    assert load_project(world(text)).data == ""


def test_data_that_is_in_no_file_never_changes(world):
    assert data(world, "files = []\n") == data(world, "files = []\n") is not None


def test_every_change_below_a_named_folder_is_seen(world, images: Path):
    named = 'files = ["../images"]\n'
    seen = [data(world, named)]

    def changed() -> None:
        seen.append(data(world, named))

    (images / "signs" / "2.png").write_bytes(b"two")
    changed()
    (images / "signs" / "2.png").write_bytes(b"three")
    changed()
    os.utime(images / "labels", ns=(0, 1))
    changed()
    (images / "signs" / "2.png").rename(images / "2.png")
    changed()
    (images / "signs" / "1.png").unlink()
    changed()
    assert len({*seen}) == len(seen) == 6 and None not in seen
    assert data(world, named) == seen[-1]


def test_a_file_is_named_by_itself_through_a_variable_and_twice_is_once(world, images: Path, monkeypatch):
    monkeypatch.setenv("EDGE_TEST_FOLDER", str(images))
    alone = data(world, 'files = ["${EDGE_TEST_FOLDER}/labels"]\n')
    assert alone == data(world, 'files = ["../images/labels", "../images/../images/labels"]\n')
    (images / "signs" / "1.png").write_bytes(b"other")
    assert alone == data(world, 'files = ["../images/labels"]\n')
    (images / "labels").write_bytes(b"10")
    assert alone != data(world, 'files = ["../images/labels"]\n')


def test_links_count_as_what_they_point_to_and_loops_end(world, images: Path, tmp_path: Path):
    (images / "self").symlink_to(images)
    (images / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "stored").write_bytes(b"stored")
    (images / "2.png").symlink_to(tmp_path / "stored")
    (tmp_path / "store" / "deep").mkdir(parents=True)
    (tmp_path / "store" / "deep" / "3.png").write_bytes(b"three")
    (images / "store").symlink_to(tmp_path / "store")
    before = data(world, 'files = ["../images"]\n')
    (tmp_path / "stored").write_bytes(b"stored anew")
    after = data(world, 'files = ["../images"]\n')
    assert before != after
    (tmp_path / "store" / "deep" / "3.png").write_bytes(b"three anew")
    assert after != data(world, 'files = ["../images"]\n')


def test_what_is_not_there_is_named(world, tmp_path: Path):
    with pytest.raises(UsageError) as caught:
        demands.kept(load_project(world(TOML + 'files = ["../images"]\n')), load_profile("local"))
    assert caught.value.message == f"deploy.toml: data.files names '../images', and there is no '{tmp_path}/images'."
    assert caught.value.hint == "name what is there; files = [] where nothing is read."
