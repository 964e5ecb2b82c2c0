"""Two runs of one case in, their relative differences out."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from equality_lib.cases import STEPS
from tdro_hpc.training.checkpoint import ENGINE, checkpoint_folder, open_checkpoint

QUANTITIES = ("embeddings", "losses", "gradients", "norm", "parameters", "alpha")


def differences(found: Path, wanted: Path) -> dict[str, float]:
    """Relative L2 differences of two folders that rank.py has written; of tensors with names, the largest of all.

    A gradient is read from the checkpoint after the first step: it is Adam's first moment but for a factor that is the
    same everywhere. One whose size is nothing but rounding is measured against the largest of the model.
    """
    ours, theirs = (json.loads((folder / "results.json").read_text()) for folder in (found, wanted))
    vectors = [load_file(folder / "vectors.safetensors")["vectors"] for folder in (found, wanted)]
    return {
        "embeddings": _relative(*vectors),
        "losses": _relative(torch.tensor(ours["losses"]), torch.tensor(theirs["losses"])),
        "gradients": _largest(found, wanted, 1, "optimizer.exp_avg."),
        "norm": _relative(torch.tensor(ours["norms"]), torch.tensor(theirs["norms"])),
        "parameters": _largest(found, wanted, STEPS, "parameter."),
        "alpha": _relative(torch.tensor(ours["alphas"]), torch.tensor(theirs["alphas"])),
    }


def _relative(found: Tensor, wanted: Tensor, least: float = 0.0) -> float:
    difference = (found.double() - wanted.double()).norm()
    return float(difference / max(float(wanted.double().norm()), least, 1e-30))


def _largest(found: Path, wanted: Path, step: int, prefix: str) -> float:
    folders = (checkpoint_folder(folder / "checkpoints", step) for folder in (found, wanted))
    ours, theirs = (open_checkpoint(folder).tensors(ENGINE) for folder in folders)
    names = {name for name in theirs.keys() if name.startswith(prefix)}
    assert names and names == {name for name in ours.keys() if name.startswith(prefix)}, "other tensors"
    least = 1e-4 * max(float(theirs[name].norm()) for name in names)
    return max(_relative(ours[name], theirs[name], least) for name in names)
