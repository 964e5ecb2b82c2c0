"""Everything with state in, one folder a checkpoint out, and back. safetensors and JSON only: nothing is unpickled.

`checkpoints/step-00000100/` holds state-<world rank>.safetensors of every rank that has something to write (tensors or
slices of them, named <part>/<key>), and state.json: the step, the parts' plain values, the checksum of every file and
where every tensor lies. Nothing in it depends on how the model was spread over ranks.
"""

import hashlib
import json
import os
import re
import secrets
import shlex
import shutil
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from tdro_hpc.parallel.objects import gather_objects, on_all_ranks
from tdro_hpc.parallel.process import broadcast_from_first, world_rank, world_size
from tdro_hpc.parallel.slices import Slice, StoredTensors
from tdro_hpc.training.stored import Layout, StoredSlices, join_layouts, layout_from_json, layout_in
from tdro_hpc.training.tensorfile import sha256_of, write_tensors

State = dict[str, Any]
ENGINE = "engine"  # the part that is spread over ranks; the state of the others is the same on all
_PATIENCE_SECONDS = 60.0  # attributes of a network disk are looked up again after a minute at the latest
_NAMED = 3  # damaged files in a message


class Part(Protocol):
    """Something whose state a checkpoint keeps, as {"tensors": {name: Tensor}, "values": JSON-able}.

    The engine gives the tensors, or Slices, that this rank has to write, and takes them as StoredTensors.
    """

    def state_dict(self) -> State: ...

    def load_state_dict(self, state: State) -> None: ...


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files are known to be those that were written. Tensors are read when they are asked for."""

    folder: Path
    step: int
    values: dict[str, Any]  # plain values of each part
    layouts: dict[str, Layout]  # <part>/<key> -> where it lies

    def tensors(self, part: str) -> StoredTensors:
        """Tensors of one part, by the names that the part gave them."""
        return StoredSlices(self.folder, self.layouts, prefix=f"{part}/")


def checkpoint_folder(folder: Path, step: int) -> Path:
    """Folder of the checkpoint after `step` steps among those in `folder`."""
    return folder / f"step-{step:08d}"


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps of the finished checkpoints in `folder`, rising; unfinished ones have other names and do not count."""
    if not folder.is_dir():
        return []
    matches = [
        re.fullmatch(r"step-(\d+)", entry.name) for entry in folder.iterdir() if (entry / "state.json").is_file()
    ]
    return sorted(int(match[1]) for match in matches if match)


def newest_step(folder: Path) -> int:
    """The step of the newest checkpoint that rank 0 sees, on all ranks; 0 when there is none. All ranks call it.

    A network disk may show the newest folder late on other nodes: ranks that looked for themselves would disagree.
    """
    steps = checkpoint_steps(folder) if world_rank() == 0 else []
    return int(broadcast_from_first(torch.tensor(steps[-1] if steps else 0)))


def save_checkpoint(folder: Path, step: int, parts: Mapping[str, Part], *, keep: int) -> None:
    """Write the state after `step` optimiser steps, then delete all but the newest `keep` checkpoints.

    All ranks call it together and return when the checkpoint is there; where one fails, all do.
    """
    target = checkpoint_folder(folder, step)
    together = partial(on_all_ranks, what=f"save {target}")
    first = world_rank() == 0
    temporary = folder / together(lambda: _begin(target) if first else "")[0]
    try:
        reports = together(lambda: _write_own(temporary, parts))
        together(lambda: _finish(temporary, target, step, reports, keep=keep) if first else None)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True) if first else None
        raise


def _begin(target: Path) -> str:
    """Make the folder that all ranks write into, which takes the place of `target` in the end; its name."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for leftover in target.parent.glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    # An attempt that is being ended may still write into its own.
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    temporary.mkdir()
    return temporary.name


def _write_own(temporary: Path, parts: Mapping[str, Part]) -> State:
    """Write what this rank has to; {"files", "layouts", "values"} for state.json.

    raises ValueError if rank 0 has made the folder on a disk that this node does not see
    """
    values: State = {}
    found: dict[str, Tensor | Slice] = {}
    for name, part in parts.items():
        if name == ENGINE or world_rank() == 0:
            state = part.state_dict()
            values[name] = state["values"]
            found |= {f"{name}/{key}": value for key, value in state["tensors"].items()}
    if not found:
        return {"files": {}, "layouts": {}, "values": values}
    if not temporary.is_dir():
        raise ValueError(
            f"Rank 0 has made the folder {temporary}, but {socket.gethostname()} does not see it. "
            "Set runs_dir to a folder that all nodes share, then type the same line again."
        )
    path = temporary / f"state-{world_rank():05d}.safetensors"
    tensors = {key: value.tensor if isinstance(value, Slice) else value for key, value in found.items()}
    sha256 = write_tensors(path, tensors)
    return {
        "files": {path.name: {"bytes": path.stat().st_size, "sha256": sha256}},
        "layouts": {key: layout_in(path.name, value) for key, value in found.items()},
        "values": values,
    }


def _finish(temporary: Path, target: Path, step: int, reports: list[State], *, keep: int) -> None:
    """Write state.json for what all ranks wrote, give the folder its name, and delete what is older."""
    layouts = join_layouts(report["layouts"] for report in reports)
    document = {
        "step": step,
        "values": reports[0]["values"],
        "files": {name: file for report in reports for name, file in report["files"].items()},
        "tensors": {name: layout.as_json() for name, layout in layouts.items()},
    }
    with (temporary / "state.json").open("w", encoding="utf-8") as file:
        json.dump({**document, "sha256": _seal(document)}, file)
        file.flush()
        os.fsync(file.fileno())
    if target.exists():
        _delete(target)
    os.replace(temporary, target)
    for old in checkpoint_steps(target.parent)[:-keep]:
        _delete(checkpoint_folder(target.parent, old))


def _delete(source: Path) -> None:
    """Remove a checkpoint; one that is half removed does not count."""
    hidden = source.with_name(f".{source.name}.{secrets.token_hex(4)}")
    os.replace(source, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def load_checkpoint(
    folder: Path, parts: Mapping[str, Part], *, step: int | None = None, patience_seconds: float = _PATIENCE_SECONDS
) -> int:
    """Put a checkpoint into `parts`; returns its step, 0 when there is none. All ranks call it together.

    It may have been saved by any number of ranks. They share the work of checking its files.

    step              that of newest_step; None = the newest that this process sees
    patience_seconds  a network disk may need to show it
    raises            ValueError if its files are not those that were written, if its parts are others than those of
                      this run, or if it does not appear
    """
    if step is None:
        step = max(checkpoint_steps(folder), default=0)
    if step == 0:
        return 0
    source = checkpoint_folder(folder, step)
    on_all_ranks(lambda: _wait_for(source, patience_seconds), what=f"see {source}")
    _check(source, _damages_by_all, lambda: gather_objects(checkpoint_steps(folder))[0])
    checkpoint = _read(source)
    if set(checkpoint.values) != set(parts):
        raise ValueError(
            f"{source} holds the state of {', '.join(sorted(checkpoint.values))}; this run needs "
            f"{', '.join(sorted(parts))}. Was it made by another version? Remove {os.fspath(folder)} to start anew."
        )
    for name, part in parts.items():
        stored = checkpoint.tensors(name)
        tensors = stored if name == ENGINE else {key: stored[key] for key in stored.keys()}
        part.load_state_dict({"tensors": tensors, "values": checkpoint.values[name]})
    return checkpoint.step


def open_checkpoint(source: Path) -> Checkpoint:
    """The checkpoint in the folder `source`, for a process that works alone.

    raises ValueError if its files are not those that were written; names the newest one before it that is whole
    """
    _check(source, _damages, lambda: checkpoint_steps(source.parent))
    return _read(source)


def _read(source: Path) -> Checkpoint:
    document = json.loads((source / "state.json").read_text(encoding="utf-8"))
    layouts = {name: layout_from_json(layout) for name, layout in document["tensors"].items()}
    return Checkpoint(folder=source, step=document["step"], values=document["values"], layouts=layouts)


def _check(source: Path, damages: Callable[[Path], list[str]], steps: Callable[[], list[int]]) -> None:
    """Return when the checkpoint is as it was written.

    damages  what is wrong with a checkpoint, in words
    steps    of all checkpoints beside it; asked for when it is damaged
    raises   ValueError that says what to type to go on with the newest one before it that is whole
    """
    found = damages(source)
    if not found:
        return
    words = "; ".join(found[:_NAMED]) + (f"; and {len(found) - _NAMED} more" if len(found) > _NAMED else "")
    broken, then = [source], "No earlier one is whole; to start the stage anew"
    for step in reversed(steps()):
        candidate = checkpoint_folder(source.parent, step)
        if candidate.name >= source.name:
            continue
        if not damages(candidate):
            then = f"To continue after step {step} instead"
            break
        broken.append(candidate)
    line = " ".join(["rm -r", *(shlex.quote(os.fspath(path)) for path in broken)])
    raise ValueError(f"The checkpoint {source} is damaged: {words}. {then}, type: {line} and then the same line again.")


def _damages_by_all(source: Path) -> list[str]:
    """What is wrong with a checkpoint, on all ranks the same; each has looked at its share of the files."""
    look = partial(_damages, source, share=world_rank(), shares=world_size())
    return list(dict.fromkeys(words for found in on_all_ranks(look, what=f"check {source}") for words in found))


def _damages(source: Path, *, share: int = 0, shares: int = 1) -> list[str]:
    """What is wrong with state.json, or with every `shares`-th file that it lists; empty = nothing."""
    path = source / "state.json"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return [f"{path} is missing"]
    except ValueError as error:
        return [f"{path} is cut off or was changed ({error})"]
    written = document.pop("sha256", None)
    if written is None:
        return [f"{path} has no checksums, so it is of an older version, which this one does not read"]
    if _seal(document) != written:
        return [f"{path} was changed: its sha256 is {_short(_seal(document))}, it was {_short(written)} when written"]
    files = sorted(document["files"].items())[share::shares]
    return [words for name, file in files if (words := _damage_of(source / name, file))]


def _damage_of(path: Path, written: Mapping[str, Any]) -> str:
    if not path.is_file():
        return f"{path} is missing"
    size = path.stat().st_size
    if size != written["bytes"]:
        return f"{path} has {size:,} bytes, {written['bytes']:,} were written"
    found = sha256_of(path)
    if found != written["sha256"]:
        return f"{path} was changed: its sha256 is {_short(found)}, it was {_short(written['sha256'])} when written"
    return ""


def _short(sha256: str) -> str:
    return f"{sha256[:16]}..."


def _seal(document: State) -> str:
    """Checksum of a JSON document, the same before it is written and after it is read."""
    read = json.loads(json.dumps(document))
    return hashlib.sha256(json.dumps(read, sort_keys=True).encode()).hexdigest()


def _wait_for(source: Path, seconds: float) -> None:
    """Return when a checkpoint is there. Its folder comes as a whole: with state.json all files are there."""
    deadline = time.monotonic() + seconds
    while not (source / "state.json").is_file():
        if time.monotonic() > deadline:
            raise ValueError(
                f"Rank 0 sees the checkpoint {source}, but {socket.gethostname()} did not within {seconds:.0f} s. "
                "Set runs_dir to a folder that all nodes share, then type the same line again."
            )
        # Listing the folder makes a network disk look again for names that it has noted as missing.
        os.listdir(source.parent if source.parent.is_dir() else ".")
        time.sleep(min(1.0, seconds / 10))
