"""What several ranks write in slices is read back whole or in any other slices. The ranks are played one by one."""

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from tdro_hpc.parallel.slices import Slice, WholeTensors
from tdro_hpc.training import checkpoint
from tdro_hpc.training.checkpoint import checkpoint_folder, load_checkpoint, open_checkpoint
from tdro_hpc.training.stored import StoredSlices
from tdro_hpc.training.tensorfile import sha256_of, write_tensors


class Engine:
    """Part that has these tensors and slices to write, and keeps what it is given."""

    def __init__(self, tensors):
        self.tensors = tensors
        self.given = None

    def state_dict(self):
        return {"tensors": self.tensors, "values": {"steps_done": 3}}

    def load_state_dict(self, state):
        self.given = state


def save_as_ranks(folder: Path, of_ranks: list[dict]) -> Path:
    """The checkpoint of step 3 that ranks with these engine tensors write together."""
    target = checkpoint_folder(folder, 3)
    temporary = folder / checkpoint._begin(target)
    with pytest.MonkeyPatch.context() as patch:
        reports = []
        for rank, tensors in enumerate(of_ranks):
            patch.setattr(checkpoint, "world_rank", lambda rank=rank: rank)
            reports.append(checkpoint._write_own(temporary, {"engine": Engine(tensors)}))
        checkpoint._finish(temporary, target, 3, reports, keep=1)
    return target


def cut(tensor, dim, bounds):
    """Slices of a tensor between the bounds, and before the first and after the last one."""
    edges = [0, *bounds, tensor.shape[dim]]
    pairs = zip(edges, edges[1:], strict=False)
    return [Slice(tensor.narrow(dim, a, b - a), tuple(tensor.shape), dim, a) for a, b in pairs]


def test_slices_along_any_dim_uneven_and_of_several_ranks_become_whole_and_other_slices(tmp_path):
    tall, wide = torch.arange(14.0).reshape(7, 2), torch.arange(30, dtype=torch.bfloat16).reshape(3, 10)
    a, b, c = cut(tall, 0, [1, 5])
    d, e = cut(wide, 1, [4])
    of_ranks = [{"tall": b, "wide": e, "norm": torch.ones(2)}, {}, {"tall": c, "wide": d}, {"tall": a}]
    source = save_as_ranks(tmp_path, of_ranks)
    names = ["state-00000.safetensors", "state-00002.safetensors", "state-00003.safetensors", "state.json"]
    assert sorted(path.name for path in source.iterdir()) == names, "rank 1 has nothing to write"
    stored = open_checkpoint(source).tensors("engine")
    assert sorted(stored.keys()) == ["norm", "tall", "wide"] and "tall" in stored and "engine/tall" not in stored
    assert stored.shape("wide") == (3, 10)
    assert torch.equal(stored["tall"], tall) and torch.equal(stored["wide"], wide)
    assert stored["wide"].dtype == stored.dtype("wide") == torch.bfloat16
    assert torch.equal(stored.part("tall", 0, 0, 6), tall[:6])
    assert torch.equal(stored.part("tall", 1, 1, 2), tall[:, 1:])
    assert torch.equal(stored.part("wide", 1, 3, 9), wide[:, 3:9])
    assert stored.part("tall", 0, 5, 5).shape == (0, 2)


@st.composite
def tensors_of_ranks(draw):
    """Some tensors, and the slices of them that ranks have."""
    world = draw(st.integers(1, 4))
    whole, of_ranks = {}, [{} for _ in range(world)]
    for number in range(draw(st.integers(1, 4))):
        shape = draw(st.lists(st.integers(0, 5), max_size=3))
        dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool]))
        tensor = torch.arange(torch.Size(shape).numel()).reshape(shape).remainder(97).to(dtype)
        name = f"parameter.{number}"
        whole[name] = tensor
        writers = draw(st.permutations(range(world)))
        if not shape or draw(st.booleans()):
            of_ranks[writers[0]][name] = tensor
            continue
        dim = draw(st.integers(0, len(shape) - 1))
        num_pieces = draw(st.integers(1, world))
        bounds = draw(st.lists(st.integers(0, shape[dim]), min_size=num_pieces - 1, max_size=num_pieces - 1))
        for rank, piece in zip(writers, cut(tensor, dim, sorted(bounds)), strict=False):
            of_ranks[rank][name] = piece
    return whole, of_ranks


@settings(max_examples=40, deadline=None)
@given(tensors_of_ranks(), st.data())
def test_any_slicing_gives_every_tensor_and_every_part_back(tensors, data):
    whole, of_ranks = tensors
    with tempfile.TemporaryDirectory() as folder:
        stored = open_checkpoint(save_as_ranks(Path(folder), of_ranks)).tensors("engine")
        assert set(stored.keys()) == set(whole)
        wanted = WholeTensors(whole)
        for name, tensor in whole.items():
            assert stored.shape(name) == wanted.shape(name)
            assert stored[name].dtype == tensor.dtype and torch.equal(stored[name], tensor)
            if tensor.ndim:
                dim = data.draw(st.integers(0, tensor.ndim - 1))
                start, stop = sorted(data.draw(st.integers(0, tensor.shape[dim])) for _ in range(2))
                assert torch.equal(stored.part(name, dim, start, stop), wanted.part(name, dim, start, stop))


def test_engine_reads_when_it_wants_and_its_tensors_outlive_the_file(tmp_path):
    part = Engine({})
    save_as_ranks(tmp_path, [{"rows": piece} for piece in cut(torch.arange(6.0), 0, [2])])
    assert load_checkpoint(tmp_path, {"engine": part}) == 3
    stored = part.given["tensors"]
    assert isinstance(stored, StoredSlices) and part.given["values"] == {"steps_done": 3}
    rows = stored["rows"]
    for path in tmp_path.glob("step-*/*.safetensors"):
        path.write_bytes(bytes(path.stat().st_size))
    assert rows.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


def test_no_file_is_opened_for_rows_that_it_does_not_have(tmp_path):
    source = save_as_ranks(tmp_path, [{"rows": piece} for piece in cut(torch.arange(6.0), 0, [2, 4])])
    stored = open_checkpoint(source).tensors("engine")
    (source / "state-00001.safetensors").unlink()
    assert stored.part("rows", 0, 4, 6).tolist() == [4.0, 5.0] and stored.part("rows", 0, 0, 2).tolist() == [0.0, 1.0]
    with pytest.raises(FileNotFoundError):
        stored.part("rows", 0, 1, 3)


@pytest.mark.parametrize(
    ("chosen", "words"),
    [((0, 2), "rows 1 to 5 of .*rows"), ((0, 1), "rows 5 to 7 of .*rows"), ((0, 1, 1, 2), "by two")],
    ids=["hole", "no end", "twice"],
)
def test_slices_that_do_not_cover_a_tensor_once_are_never_saved(chosen, words, tmp_path):
    pieces = cut(torch.arange(14.0).reshape(7, 2), 0, [1, 5])
    with pytest.raises(AssertionError, match=words):
        save_as_ranks(tmp_path, [{"rows": pieces[i]} for i in chosen])
    assert not list(tmp_path.glob("step-*"))


def test_ranks_that_disagree_on_a_tensor_save_nothing(tmp_path):
    with pytest.raises(AssertionError, match="ranks disagree"):
        save_as_ranks(tmp_path, [{"a": torch.ones(2)}, {"a": Slice(torch.ones(1, 2), (2, 2), 0, 1)}])


@pytest.mark.parametrize(("dim", "start"), [(0, 3), (2, 0), (0, -1)])
def test_slice_outside_of_its_whole_is_our_mistake(dim, start):
    with pytest.raises(AssertionError, match="Slice"):
        Slice(torch.ones(2, 3), (4, 3), dim, start)


def test_rank_that_does_not_see_the_folder_says_what_to_set(tmp_path):
    with pytest.raises(ValueError, match="Rank 0 has made the folder .*does not see it. Set runs_dir"):
        checkpoint._write_own(tmp_path / "elsewhere", {"engine": Engine({"a": torch.ones(1)})})


def test_file_is_what_safetensors_reads_and_its_checksum_that_of_the_disk(tmp_path):
    types = [torch.uint8, torch.float64, torch.bool, torch.float16, torch.int32, torch.bfloat16, torch.int64]
    tensors = {f"odd size {dtype}": torch.ones(3, 1, dtype=dtype) for dtype in types}
    tensors |= {"number": torch.tensor(2.5), "none": torch.zeros(0, 4), "view": torch.arange(6.0).reshape(2, 3).T}
    assert write_tensors(tmp_path / "x.safetensors", tensors) == sha256_of(tmp_path / "x.safetensors")
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
