import hashlib
import json
import shutil
import threading

import pytest
import torch
from safetensors.torch import load_file

from tdro_hpc.training.checkpoint import checkpoint_steps, load_checkpoint, newest_step, save_checkpoint


class Counter:
    """Part with one tensor and one plain value."""

    def __init__(self, count: int) -> None:
        self.tensor, self.count = torch.full((3,), float(count)), count

    def state_dict(self):
        return {"tensors": {"weight": self.tensor, "deep/name": self.tensor * 2}, "values": {"count": self.count}}

    def load_state_dict(self, state):
        self.tensor, self.count = state["tensors"]["weight"], state["values"]["count"]
        assert torch.equal(state["tensors"]["deep/name"], self.tensor * 2)


def test_newest_checkpoint_comes_back_and_older_ones_go(tmp_path):
    for step in (1, 2, 10):
        save_checkpoint(tmp_path, step, {"a": Counter(step), "b": Counter(-step)}, keep=2)
    assert checkpoint_steps(tmp_path) == [2, 10]
    parts = {"a": Counter(0), "b": Counter(0)}
    assert load_checkpoint(tmp_path, parts) == 10
    assert (parts["a"].count, parts["b"].count) == (10, -10)
    assert parts["b"].tensor.tolist() == [-10.0] * 3


def test_unfinished_checkpoint_does_not_count_and_is_swept_away(tmp_path):
    save_checkpoint(tmp_path, 1, {"a": Counter(1)}, keep=2)
    leftover = tmp_path / ".step-00000002.4711"
    leftover.mkdir()
    (leftover / "state.safetensors").write_bytes(b"half")
    assert load_checkpoint(tmp_path, {"a": Counter(0)}) == 1
    save_checkpoint(tmp_path, 3, {"a": Counter(3)}, keep=2)
    assert not leftover.exists()


def test_save_that_fails_leaves_the_last_good_one(tmp_path):
    class Broken(Counter):
        def state_dict(self):
            return {"tensors": {}, "values": {"count": object()}}

    save_checkpoint(tmp_path, 1, {"a": Counter(1)}, keep=1)
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path, 2, {"a": Broken(2)}, keep=1)
    assert checkpoint_steps(tmp_path) == [1]
    assert load_checkpoint(tmp_path, {"a": Counter(0)}) == 1


def test_no_checkpoint_is_step_zero(tmp_path):
    assert load_checkpoint(tmp_path / "none", {"a": Counter(0)}) == 0


def test_other_parts_are_refused_in_words(tmp_path):
    save_checkpoint(tmp_path, 1, {"a": Counter(1)}, keep=1)
    with pytest.raises(ValueError, match="holds the state of a; this run needs b"):
        load_checkpoint(tmp_path, {"b": Counter(0)})


def test_files_are_safetensors_and_json_only(tmp_path):
    save_checkpoint(tmp_path, 7, {"a": Counter(7)}, keep=1)
    folder = tmp_path / "step-00000007"
    assert sorted(path.name for path in folder.iterdir()) == ["state-00000.safetensors", "state.json"]
    document = json.loads((folder / "state.json").read_text())
    assert (document["step"], document["values"]) == (7, {"a": {"count": 7}})
    content = (folder / "state-00000.safetensors").read_bytes()
    written = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert document["files"] == {"state-00000.safetensors": written}
    assert set(load_file(folder / "state-00000.safetensors")) == {"a/weight", "a/deep/name"}


def test_step_that_rank_0_names_is_loaded_and_not_a_newer_one(tmp_path):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"a": Counter(step)}, keep=2)
    part = Counter(0)
    assert newest_step(tmp_path) == 2 and newest_step(tmp_path / "none") == 0
    assert load_checkpoint(tmp_path, {"a": part}, step=1) == 1 and part.count == 1


def test_checkpoint_that_a_network_disk_shows_late_is_waited_for(tmp_path):
    save_checkpoint(tmp_path / "real", 3, {"a": Counter(3)}, keep=1)
    arrival = threading.Timer(0.3, shutil.copytree, (tmp_path / "real", tmp_path / "late"))
    arrival.start()
    part = Counter(0)
    assert load_checkpoint(tmp_path / "late", {"a": part}, step=3, patience_seconds=20) == 3 and part.count == 3
    arrival.join()
    with pytest.raises(ValueError, match="Rank 0 sees the checkpoint .*step-00000004, but .* did not within 0 s"):
        load_checkpoint(tmp_path / "late", {"a": part}, step=4, patience_seconds=0.1)
