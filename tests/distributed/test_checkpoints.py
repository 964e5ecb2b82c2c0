"""Checkpoints that two ranks write together: killed in the middle of a save, continued there and elsewhere, damaged."""

import json
import shutil
import signal

import pytest
import torch

from tdro_hpc.parallel.process import Process
from tdro_hpc.training.checkpoint import checkpoint_steps, open_checkpoint
from tests.distributed.checkpoint_rank import TALL, WIDE, run
from tests.distributed.launching import end_ranks, run_ranks, start_ranks

SCRIPT = "checkpoint_rank.py"
ALONE = Process(data_rank=0, data_size=1, local_rank=0, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of two ranks: unbroken, killed and continued, with damaged checkpoints, and with a full disk."""
    folder = tmp_path_factory.mktemp("checkpoints")
    ranks = start_ranks(SCRIPT, folder, 2, ["unbroken", "killed:4:kill"])
    for rank in ranks:
        rank.join(120)
    end_ranks(ranks)
    assert ranks[1].exitcode == -signal.SIGKILL
    assert checkpoint_steps(folder / "killed" / "checkpoints") == [2], "the save after step 4 does not count"
    assert checkpoint_steps(folder / "unbroken" / "checkpoints") == [2, 4, 6]
    shutil.copytree(folder / "killed", folder / "alone")
    shutil.copytree(folder / "unbroken", folder / "damaged")
    for rank, step in ((1, 6), (0, 4)):
        path = folder / "damaged" / "checkpoints" / f"step-{step:08d}" / f"state-{rank:05d}.safetensors"
        path.write_bytes(path.read_bytes()[:-8])
    run_ranks(SCRIPT, folder, 2, ["killed", "damaged", "full:4:full"])
    return folder


def last_of(stage_dir):
    return stage_dir / "checkpoints" / "step-00000006"


def test_run_that_lost_a_rank_in_a_save_ends_like_the_unbroken_one(runs):
    names = ["state-00000.safetensors", "state-00001.safetensors", "state.json"]
    for folder in (runs / "unbroken", runs / "killed"):
        assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
            f"step-0000000{step}" for step in (2, 4, 6)
        ], "nothing is left of the save that was killed"
        assert sorted(path.name for path in last_of(folder).iterdir()) == names
    for name in names:
        assert (last_of(runs / "unbroken") / name).read_bytes() == (last_of(runs / "killed") / name).read_bytes()


def test_one_process_goes_on_where_two_ranks_were_killed(runs):
    assert run(runs / "alone", ALONE, 1) == ["s0 continues after step 2"]
    of_two, of_one = (open_checkpoint(last_of(runs / name)) for name in ("unbroken", "alone"))
    assert len(json.loads((of_two.folder / "state.json").read_text())["files"]) == 2
    assert len(json.loads((of_one.folder / "state.json").read_text())["files"]) == 1
    assert of_one.values == of_two.values == {"engine": {}, "count": {"steps": 6}}
    one, two = of_one.tensors("engine"), of_two.tensors("engine")
    assert one.keys() == two.keys() == ["norm", "tall", "wide"]
    assert (one.shape("tall"), one.shape("wide")) == (TALL, WIDE) and one["wide"].unique().numel() == 18
    for name in one.keys():  # noqa: SIM118, it is no dict
        assert torch.equal(one[name], two[name]), name


def test_damage_that_one_rank_finds_is_refused_by_all_in_the_same_words(runs):
    words = [(runs / f"damaged-{rank}.txt").read_text() for rank in range(2)]
    assert words[0] == words[1]
    damaged = [runs / "damaged" / "checkpoints" / f"step-{step:08d}" for step in (6, 4)]
    assert f"{damaged[0]}/state-00001.safetensors has" in words[0] and "bytes" in words[0]
    assert "To continue after step 2 instead" in words[0] and f"rm -r {damaged[0]} {damaged[1]} and" in words[0]


def test_save_that_fails_on_one_rank_fails_on_all_and_leaves_nothing(runs):
    of_first, of_last = ((runs / f"full-{rank}.txt").read_text() for rank in range(2))
    target = runs / "full" / "checkpoints" / "step-00000004"
    assert of_last == "[Errno 28] No space left on device"
    assert of_first == f"Another rank could not save {target}: rank 1: OSError: {of_last}"
    assert [path.name for path in target.parent.iterdir()] == ["step-00000002"]
