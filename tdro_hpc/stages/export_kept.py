"""What stage export notes of a finished folder that is still to be pushed: the same line then pushes it as it is.

It is noted where launch/record.py looks how far a stage has come: step 1 is the folder, step 2 the push. A stage that
has come nowhere is begun anew, and its folder removed.
"""

import dataclasses
import hashlib
import shutil
from pathlib import Path
from typing import Any

from tdro_hpc.atomic import write_json
from tdro_hpc.config.checks import exported_stage
from tdro_hpc.config.schema import Config
from tdro_hpc.launch.record import identity_of, read_json

MODEL = Path("out", "model")  # of the stage
_STATE = Path("checkpoints", "step-00000001", "state.json")


def source_of(config: Config, run_dir: Path, origin: str) -> dict[str, Any]:
    """What a folder of stage export is made from and how: equal for two calls that would write the same files.

    origin  of the weights, under their stage: out/model, or checkpoints/step-00000100
    """
    trained = run_dir / exported_stage(config)
    if config.export.checkpoint == 0:
        identity = identity_of(trained)
    else:
        identity = hashlib.sha256((trained / origin / "state.json").read_bytes()).hexdigest()
    form = dataclasses.asdict(config.export)
    del form["private"]  # of the repository, not of the files
    evaluation = identity_of(run_dir / "eval")  # whose table is in the model card
    return {"stage": trained.name, "origin": origin, "identity": identity, "eval": evaluation, "export": form}


def is_kept(stage_dir: Path, source: dict[str, Any]) -> bool:
    """Whether the folder of an earlier call is there, whole, and was made from this source."""
    return read_json(stage_dir / _STATE) == {"source": source, "files": _sizes(stage_dir / MODEL)}


def keep(stage_dir: Path, source: dict[str, Any]) -> None:
    """Note that the folder is whole."""
    write_json(stage_dir / _STATE, {"source": source, "files": _sizes(stage_dir / MODEL)})


def _sizes(folder: Path) -> dict[str, int]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def forget(stage_dir: Path) -> None:
    """Take the note back, before the folder is made again."""
    shutil.rmtree(stage_dir / _STATE.parent, ignore_errors=True)
