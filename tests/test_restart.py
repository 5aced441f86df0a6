"""What a kill leaves in a run's folder, put in order before the next start."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cranium import checkpoint, restart
from cranium.config import UserError


def made(run: Path, name: str, step: int) -> Path:
    folder = run / restart.RAY / f"checkpoint_{name}"
    folder.mkdir(parents=True)
    checkpoint.save_training(folder, {"step": step, "tensor": torch.arange(1000)})
    return folder


def cut(folder: Path) -> None:
    with (folder / checkpoint.TRAINING).open("r+b") as file:
        file.truncate(1000)


def listed(run: Path, *folders: Path) -> Path:
    path = run / restart.RAY / restart.LIST
    path.write_text(json.dumps({"checkpoint_results": [{"checkpoint_dir_name": f.name} for f in folders]}))
    return path


def test_a_sound_run_stays_as_it_is(tmp_path: Path) -> None:
    folders = [made(tmp_path, name, step) for name, step in (("a", 2), ("b", 4))]
    path = listed(tmp_path, *folders)
    before = path.read_text()
    restart.tidy(tmp_path)
    assert restart.kept(tmp_path) == folders and path.read_text() == before
    restart.tidy(tmp_path / "nothing")


def test_a_copy_that_was_cut_goes_and_a_whole_one_that_ray_had_not_listed_yet_stays(tmp_path: Path) -> None:
    _, first, torn, empty, late = (
        made(tmp_path, name, 2) for name in "0abcd"
    )  # 0: from before a list was lost
    cut(torn)
    for path in empty.iterdir():
        path.unlink()
    path = listed(tmp_path, first)
    restart.tidy(tmp_path)
    assert restart.kept(tmp_path) == [first, late] and path.is_file()


@pytest.mark.parametrize("damage", ["", '{"checkpoint_res', "[]", "gone"])
def test_rays_list_goes_where_ray_would_refuse_it(tmp_path: Path, damage: str) -> None:
    first, second = made(tmp_path, "a", 2), made(tmp_path, "b", 4)
    path = listed(tmp_path, first, second, tmp_path / "checkpoint_c")  # the third is nowhere
    if damage != "gone":
        path.write_text(damage)
    restart.tidy(tmp_path)
    assert not path.exists() and restart.kept(tmp_path) == [second]


def test_checkpoints_from_before_a_step(tmp_path: Path) -> None:
    first, second, torn = (made(tmp_path, name, step) for name, step in (("a", 2), ("b", 4), ("c", 1)))
    (torn / checkpoint.COMPLETE).write_text('{"st')
    assert restart.kept(tmp_path, 3) == [first] and restart.kept(tmp_path) == [first, second, torn]
    (tmp_path / restart.RAY / restart.LIST).touch()  # begins with the same word
    assert len(restart.kept(tmp_path)) == 3


def test_the_newest_whole_one_is_taken_and_none_at_all_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [made(tmp_path, name, step) for name, step in (("a", 2), ("b", 4))]
    assert restart._newest([]) == (None, None)
    cut(folders[1])
    chosen, state = restart._newest(folders)
    assert chosen == str(folders[0]) and state and state["step"] == 2
    assert "checkpoint left out" in capsys.readouterr().out
    cut(folders[0])
    with pytest.raises(UserError, match="none of 2 checkpoints"):
        restart._newest(folders)
