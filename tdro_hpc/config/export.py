"""Keys of stage export: which model of a run becomes a Hugging Face folder, in what form, and where it is sent."""

import re
from dataclasses import dataclass

from tdro_hpc.config.bounds import above, at_least, one_of, require

NEWEST_CHECKPOINT = -1
EXPORT_DTYPES = ("auto", "float32", "bfloat16", "float16")
_REPOSITORY = re.compile(r"\w([\w.-]*\w)?/\w([\w.-]{0,94}\w)?", re.ASCII)
_NOT_IN_NAMES = re.compile(r"--|\.\.|\.git$")


@dataclass(frozen=True)
class ExportConfig:
    """Stage export: a trained model as a folder that sentence-transformers loads."""

    stage: str = "s2"  # whose model: s0, s1, s2-<weights>; s2 = the first choice of s2.weights
    checkpoint: int = 0  # 0 = the finished stage's out/model; -1 = its newest checkpoint; n = the one after step n
    lora: str = "merge"  # merge = LoRA is added to the weights; adapter = only the adapter, for peft
    dtype: str = "auto"  # of the written weights: auto = model.weights_dtype, float32, bfloat16, float16
    max_shard_gb: float = 5.0  # a file of weights is no larger (10^9 bytes), one tensor aside
    push: str = ""  # org/name on the Hugging Face hub that gets the folder; empty = it stays here
    private: bool = True  # whether a repository that export.push makes is private

    def __post_init__(self) -> None:
        require(
            at_least("export.checkpoint", self.checkpoint, NEWEST_CHECKPOINT, "0")
            + one_of("export.lora", self.lora, ("merge", "adapter"))
            + one_of("export.dtype", self.dtype, EXPORT_DTYPES)
            + above("export.max_shard_gb", self.max_shard_gb, 0, "1 to 10")
            + self._form_problems()
        )

    def _form_problems(self) -> list[str]:
        problems = []
        if self.push and (not _REPOSITORY.fullmatch(self.push) or _NOT_IN_NAMES.search(self.push)):
            problems.append(
                f"export.push is {self.push!r}; it must be <owner>/<name> of a repository on the hub, of letters, "
                "digits, -, _ and ., without -- and .. and with no .git at the end. "
                "Type export.push=my-org/my-retriever."
            )
        if self.lora == "adapter" and self.dtype not in ("auto", "float32"):
            problems.append(
                f"export.dtype is {self.dtype!r} with export.lora=adapter: an adapter is written as it was trained, in "
                "float32. Type export.dtype=auto, or export.lora=merge."
            )
        return problems
