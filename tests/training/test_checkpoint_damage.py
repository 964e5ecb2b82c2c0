"""A damaged checkpoint is named with what is wrong, and the line to type leads to the newest one that is whole."""

import json
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from tdro_hpc.training import checkpoint
from tdro_hpc.training.checkpoint import checkpoint_folder, checkpoint_steps, load_checkpoint, open_checkpoint
from tdro_hpc.training.checkpoint import save_checkpoint as save

TENSORS, STATE = "state-00000.safetensors", "state.json"
CHANGED = r" was changed: its sha256 is [0-9a-f]{16}\.\.\., it was [0-9a-f]{16}\.\.\. when written"


class Part:
    def __init__(self, value=0.0):
        self.value = value

    def state_dict(self):
        return {"tensors": {"x": torch.full((300,), self.value)}, "values": {"count": int(self.value)}}

    def load_state_dict(self, state):
        self.value = state["tensors"]["x"].unique().item()
        assert state["values"]["count"] == self.value


def save_three(folder: Path) -> None:
    for step in (10, 20, 30):
        save(folder, step, {"part": Part(float(step))}, keep=3)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_last_bit(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def change_count(path: Path) -> None:
    path.write_text(path.read_text().replace('"count": 30', '"count": 31'))


def take_checksums_away(path: Path) -> None:
    """What versions before checksums wrote."""
    document = json.loads(path.read_text())
    path.write_text(json.dumps({"step": document["step"], "values": document["values"]}))


def type_the_line(words: str) -> None:
    """Do what a message says."""
    command = shlex.split(re.search(r"type: (rm -r .*) and then the same line again\.$", words)[1])
    assert command[:2] == ["rm", "-r"] and len(command) > 2
    for folder in command[2:]:
        shutil.rmtree(folder)


def refusal(folder: Path) -> str:
    with pytest.raises(ValueError, match="type: rm -r") as caught:
        load_checkpoint(folder, {"part": Part()})
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        (TENSORS, cut_off, r" has 1,\d\d\d bytes, 1,\d\d\d were written"),
        (
            TENSORS,
            flip_last_bit,
            CHANGED,
        ),
        (TENSORS, Path.unlink, " is missing"),
        (STATE, cut_off, " is cut off or was changed"),
        (
            STATE,
            change_count,
            CHANGED,
        ),
        (STATE, take_checksums_away, " has no checksums, so it is of an older version"),
    ],
    ids=["cut off", "one bit", "missing", "state cut off", "state changed", "older version"],
)
def test_damage_is_named_and_the_line_to_type_continues_from_the_one_before(name, damage, words, tmp_path):
    save_three(tmp_path)
    file = checkpoint_folder(tmp_path, 30) / name
    damage(file)
    message = refusal(tmp_path)
    assert re.search(re.escape(str(file)) + words, message) and "To continue after step 20 instead" in message
    type_the_line(message)
    part = Part()
    assert load_checkpoint(tmp_path, {"part": part}) == 20 and part.value == 20


def test_the_one_before_is_looked_at_too(tmp_path):
    folder = tmp_path / "a folder"
    save_three(folder)
    flip_last_bit(checkpoint_folder(folder, 30) / TENSORS)
    (checkpoint_folder(folder, 20) / TENSORS).unlink()
    message = refusal(folder)
    assert "To continue after step 10 instead" in message
    type_the_line(message)
    assert load_checkpoint(folder, {"part": Part()}) == 10


def test_where_none_is_whole_the_line_starts_anew(tmp_path):
    save_three(tmp_path)
    for path in tmp_path.glob(f"step-*/{TENSORS}"):
        cut_off(path)
    message = refusal(tmp_path)
    assert "No earlier one is whole; to start the stage anew" in message
    type_the_line(message)
    assert load_checkpoint(tmp_path, {"part": Part()}) == 0


def test_nothing_is_loaded_from_a_damaged_one(tmp_path):
    save_three(tmp_path)
    flip_last_bit(checkpoint_folder(tmp_path, 30) / TENSORS)
    part = Part(5.0)
    with pytest.raises(ValueError, match="is damaged"):
        load_checkpoint(tmp_path, {"part": part})
    assert part.value == 5.0


def test_opening_one_for_export_checks_it_too(tmp_path):
    save_three(tmp_path)
    opened = open_checkpoint(checkpoint_folder(tmp_path, 30))
    assert (opened.step, opened.values) == (30, {"part": {"count": 30}})
    assert opened.tensors("part")["x"].eq(30).all() and opened.tensors("other").keys() == []
    flip_last_bit(checkpoint_folder(tmp_path, 20) / TENSORS)
    with pytest.raises(ValueError, match="To continue after step 10 instead"):
        open_checkpoint(checkpoint_folder(tmp_path, 20))
    assert open_checkpoint(checkpoint_folder(tmp_path, 30)).step == 30


class KillError(BaseException):
    """Ends a save as kill -9 does, where nothing is cleaned up either."""


@pytest.mark.parametrize("last", ["write_tensors", "_seal", "replace"])
def test_save_that_is_killed_at_any_moment_leaves_no_half_checkpoint(last, tmp_path, monkeypatch):
    save(tmp_path, 10, {"part": Part(10.0)}, keep=1)
    owner = os if last == "replace" else checkpoint

    def kill(*arguments):
        raise KillError

    with monkeypatch.context() as patch, pytest.raises(KillError):
        patch.setattr(owner, last, kill)
        patch.setattr(shutil, "rmtree", lambda *arguments, **options: None)
        save(tmp_path, 20, {"part": Part(20.0)}, keep=1)
    (leftover,) = tmp_path.glob(".step-00000020.*")
    assert checkpoint_steps(tmp_path) == [10] and load_checkpoint(tmp_path, {"part": Part()}) == 10
    save(tmp_path, 20, {"part": Part(20.0)}, keep=1)
    assert not leftover.exists() and [path.name for path in tmp_path.iterdir()] == ["step-00000020"]


def test_older_checkpoint_that_is_killed_while_it_goes_does_not_count(tmp_path, monkeypatch):
    save(tmp_path, 10, {"part": Part(10.0)}, keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path, **options: (path / TENSORS).unlink())
        save(tmp_path, 20, {"part": Part(20.0)}, keep=1)
    assert checkpoint_steps(tmp_path) == [20] and list(tmp_path.glob(".step-00000010.*"))


def test_folders_of_other_names_are_left_alone(tmp_path):
    save(tmp_path, 10, {"part": Part(10.0)}, keep=1)
    shutil.copytree(checkpoint_folder(tmp_path, 10), tmp_path / "step-00000099-mine")
    assert checkpoint_steps(tmp_path) == [10]
