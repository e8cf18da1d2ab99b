"""Which photographs a command line means, and that no result leaves the output folder or meets another."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dist_colorize.errors import UserError
from dist_colorize.postprocess.images import Stored
from dist_colorize.postprocess.inputs import inside, place, plan
from dist_colorize.text import printable


@pytest.fixture
def archive(tmp_path, monkeypatch) -> Path:
    """A folder with photographs at several depths, and things that are none."""
    monkeypatch.chdir(tmp_path)
    for name in ("in/a.jpg", "in/1931/a.jpg", "in/1931/b b.TIF", "in/clip.gif", "in/notes.txt", "in/.a.jpg.tmp"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return tmp_path


def targets(jobs, output: Path) -> list[str]:
    return [str(job.target.relative_to(output.resolve())) for job in jobs]


def test_a_folder_keeps_its_layout(archive):
    jobs, complaints = plan(["in"], archive / "out")
    assert targets(jobs, archive / "out") == ["1931/a.jpg", "1931/b b.TIF", "a.jpg", "clip.gif.png"]
    assert complaints == []


def test_files_go_by_their_names_and_patterns_by_the_path_from_the_first_wildcard(archive):
    out = archive / "out"
    assert targets(plan(["in/1931/a.jpg", "in/clip.gif"], out)[0], out) == ["a.jpg", "clip.gif.png"]
    assert targets(plan(["in/**/*.jpg"], out)[0], out) == ["1931/a.jpg", "a.jpg"]
    assert targets(plan(["in/*/a.jpg"], out)[0], out) == ["1931/a.jpg"]
    assert targets(plan([str(archive / "i?")], out)[0], out) == [
        "in/1931/a.jpg",
        "in/1931/b b.TIF",
        "in/a.jpg",
        "in/clip.gif.png",
    ]


def test_a_file_whose_name_looks_like_a_pattern_is_a_file(archive):
    (archive / "in/a[1].jpg").write_bytes(b"x")
    assert targets(plan(["in/a[1].jpg"], archive / "out")[0], archive / "out") == ["a[1].jpg"]


def test_results_inside_the_input_folder_are_not_inputs(archive):
    (archive / "in/out").mkdir()
    (archive / "in/out/old.jpg").write_bytes(b"x")
    assert "old.jpg" not in str(targets(plan(["in"], archive / "in/out")[0], archive / "in/out"))


def test_what_is_missing_is_a_complaint_and_nothing_at_all_an_error(archive):
    jobs, complaints = plan(["in/a.jpg", "gone.jpg", "none/*.png"], archive / "out")
    assert len(jobs) == 1
    assert complaints == ["gone.jpg: no such file or folder", "none/*.png: matches no photograph"]
    (archive / "bare").mkdir()
    for arguments in (["gone.jpg"], ["bare"]):
        with pytest.raises(UserError, match=r"gone\.jpg|bare"):
            plan(arguments, archive / "out")


def test_two_photographs_for_one_place_are_refused_but_one_named_twice_is_one(archive):
    with pytest.raises(UserError, match=r"in/1931/a\.jpg and in/a\.jpg|in/a\.jpg and in/1931/a\.jpg"):
        plan(["in/a.jpg", "in/1931/a.jpg"], archive / "out")
    assert len(plan(["in/a.jpg", "in/a.jpg", "in"], archive / "out")[0]) == 4


def test_a_photograph_is_never_replaced_by_its_own_result(archive):
    with pytest.raises(UserError, match="its own result"):
        plan(["in"], archive / "in")
    (archive / "out").mkdir()
    (archive / "out/a.jpg").symlink_to(archive / "in/a.jpg")
    with pytest.raises(UserError, match="its own result"):
        plan(["in/a.jpg"], archive / "out")


@pytest.mark.parametrize("name", ["../a.jpg", "b/../../a.jpg", "/etc/a.jpg", "..", "", "."])
def test_paths_that_lead_out_are_refused(tmp_path, name):
    with pytest.raises(UserError, match="no path inside"):
        place([(Stored(name, lambda: b""), name)], tmp_path)


def test_a_link_in_the_output_folder_that_leads_out_is_refused(archive):
    (archive / "out").mkdir()
    (archive / "elsewhere").mkdir()
    (archive / "out/1931").symlink_to(archive / "elsewhere")
    with pytest.raises(UserError, match="link that leads out"):
        plan(["in"], archive / "out")
    (archive / "out/1932").symlink_to(archive / "out")  # stays inside
    assert inside((archive / "out").resolve(), "1932/a.jpg")


def test_loops_of_links_end(archive):
    (archive / "in/loop").symlink_to(archive / "in")
    (archive / "in/1931/up").symlink_to("..")
    (archive / "in/dangling").symlink_to("nowhere")
    assert len(plan(["in"], archive / "out")[0]) == 4


def test_names_in_reports_are_one_printable_line():
    assert printable("line\nbreak") == "line\\nbreak"
    assert printable(os.fsdecode(b"\xff.jpg")) == "\\xff.jpg"
    assert printable("näme.jpg") == "näme.jpg"
