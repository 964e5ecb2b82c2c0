"""A stage in, the text of its Slurm job out: the file that sbatch gets and the command that hands it over.

Pure text, the same in a dry run and in a submission; made by submitit's executor, which needs no Slurm for it.
"""

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tdro_hpc.config.resources import cpus_per_rank, gpus_of_job, memory_per_node_gb
from tdro_hpc.config.schema import Config
from tdro_hpc.launch.stage import Stage

if TYPE_CHECKING:
    from submitit import SlurmExecutor

AFTERMATH = "tdro_hpc.launch.job.aftermath"
SETUP_FAILED = "a line of cluster.setup failed"
# What a shell inside another job has, and sbatch would hand on: srun would spread the ranks of this job as that one's.
_OF_ANOTHER_JOB = (
    *("SLURM_DISTRIBUTION", "SLURM_HINT", "SLURM_EXACT", "SLURM_EXCLUSIVE", "SLURM_EXPORT_ENV", "SLURM_RESTART_COUNT"),
    *("SLURM_CPU_BIND", "SLURM_CPU_BIND_LIST", "SLURM_CPU_BIND_TYPE", "SLURM_CPU_BIND_VERBOSE", "SLURM_MEM_BIND"),
    *("SLURM_MEM_PER_CPU", "SLURM_MEM_PER_GPU", "SLURM_MEM_PER_NODE", "SLURM_CPUS_PER_TASK", "SLURM_CPUS_PER_GPU"),
    *("SLURM_NTASKS_PER_NODE", "SLURM_NTASKS_PER_CORE", "SLURM_GPUS", "SLURM_GPUS_PER_NODE", "SLURM_GPUS_PER_TASK"),
    *("SLURM_GPU_BIND", "SLURM_TRES_PER_TASK", "SLURM_THREADS_PER_CORE", "SLURM_CORE_SPEC", "SLURM_STEP_GPUS"),
)


def slurm_folder(stage_dir: Path) -> Path:
    """Where submitit keeps what belongs to the Slurm jobs of a stage: scripts, pickles, what srun printed."""
    return stage_dir / "log" / "slurm"


def sbatch_script(
    config: Config, stage: Stage, stage_dir: Path, *, ranks: int, code: Path | None, link: int = 1
) -> str:
    """The file that sbatch gets for a stage.

    stage_dir   absolute
    ranks       processes of the stage
    code        absolute path of a snapshot; None = the code as it is when the job starts
    link        which of the jobs in a row under cluster.requeue=links, from 1
    """
    executor = executor_for(config, stage, stage_dir, ranks=ranks, code=code, link=link)
    return executor._make_submission_file_text(executor._submitit_command_str, "")


def sbatch_command(script: Path | str, *, after: Sequence[str], link_before: str = "") -> list[str]:
    """The command that submits a script.

    after        ids of jobs that have to end well before, or Slurm cancels this one; [] = none
    link_before  id of the link before this one, which has to be over, however it ended; empty = this is the first
    """
    # Every link waits for the inputs: when one of them fails, the first link is cancelled, and is over thereby.
    dependencies = [":".join(["afterok", *after])] if after else []
    dependencies += [f"afterany:{link_before}"] if link_before else []
    if not dependencies:
        return ["sbatch", str(script)]
    return ["sbatch", f"--dependency={','.join(dependencies)}", "--kill-on-invalid-dep=yes", str(script)]


def executor_for(
    config: Config,
    stage: Stage,
    stage_dir: Path,
    *,
    ranks: int,
    code: Path | None,
    link: int = 1,
    after: Sequence[str] = (),
    link_before: str = "",
) -> "SlurmExecutor":
    """submitit's Slurm executor, told everything that `cluster` says; makes the script and submits it."""
    assert stage_dir.is_absolute(), "a job starts in a folder that is not known here"
    assert code is None or code.is_absolute(), "a job starts in a folder that is not known here"
    # submitit takes a sixth of a second to import: only where a script is really made.
    from submitit import SlurmExecutor

    class StageExecutor(SlurmExecutor):
        """submitit's, made to run a snapshot and to put the dependency on the command line."""

        @classmethod
        def affinity(cls) -> int:
            return 2  # the text can be made without Slurm; a submission without sbatch is refused in words

        @classmethod
        def name(cls) -> str:
            return "slurm"

        @property
        def _submitit_command_str(self) -> str:
            program = "-m submitit.core._submit" if code is None else shlex.quote(str(code / "job.py"))
            return f"{self.python} -u {program} {shlex.quote(str(self.folder))}"

        def _make_submission_command(self, submission_file_path: Path) -> list[str]:
            removed = [word for name in _OF_ANOTHER_JOB for word in ("-u", name)]
            return ["env", *removed, *sbatch_command(submission_file_path, after=after, link_before=link_before)]

    executor = StageExecutor(slurm_folder(stage_dir), python=python_of(config))
    executor.update_parameters(
        nodes=1 if stage.ranks == "one" else config.cluster.nodes,
        ntasks_per_node=ranks if stage.ranks == "one" else ranks // config.cluster.nodes,
        time=-(-config.cluster.time_limit_seconds // 60),
        setup=_setup(config, stage_dir, code),
        teardown=["code=$?", _aftermath(config, stage_dir, code), "exit $?"],
        srun_args=_srun_options(config),
        wckey=None,
        job_name=_job_name(config, stage, link),
        additional_parameters=_directives(config, stage),
    )
    return executor


def python_of(config: Config) -> str:
    """How jobs call Python, as words for a shell."""
    return config.cluster.python or shlex.quote(sys.executable)


def _job_name(config: Config, stage: Stage, link: int) -> str:
    return f"tdro-{config.name}-{stage.name}" + (f"-{link}" if link > 1 else "")


def _directives(config: Config, stage: Stage) -> dict[str, Any]:
    """#SBATCH lines that submitit does not make by itself, and those that a person gives, which win."""
    cluster = config.cluster
    found: dict[str, Any] = {
        "time": cluster.time_limit,
        # Said here because submitit would take another signal from the environment of the submitter.
        "signal": f"USR2@{cluster.stop_lead_seconds}",
        "requeue" if cluster.requeue == "self" else "no_requeue": True,
        "chdir": os.getcwd(),
    }
    for key in ("partition", "account", "qos", "constraint", "exclude"):
        if getattr(cluster, key):
            found[key] = getattr(cluster, key)
    gpus = ":".join(filter(None, [cluster.gpu_type, str(gpus_of_job(cluster, stage.ranks))]))
    if cluster.gpus_per_node:
        found |= {"gpus_per_node": gpus} if cluster.gpu_request == "gpus" else {"gres": f"gpu:{gpus}"}
    if cluster.node_cpus:
        found["cpus_per_task"] = cpus_per_rank(cluster)
    if cluster.node_memory_gb:
        found["mem"] = f"{memory_per_node_gb(cluster, stage.ranks)}G"
    if cluster.mail_user:
        found |= {"mail_user": cluster.mail_user, "mail_type": cluster.mail_types}
    for option in cluster.sbatch_options:
        name, has_value, value = option.removeprefix("--").partition("=")
        # submitit names its own with underscores: an option of a person takes the place of the same one.
        found[name if name == "open-mode" else name.replace("-", "_")] = value if has_value else True
    return found


def _srun_options(config: Config) -> list[str]:
    # A rank that is lost is waited for in vain by the others. srun has not taken over --cpus-per-task since 22.05.
    options = ["--kill-on-bad-exit=1", "--open-mode=append"]
    if config.cluster.node_cpus:
        options.append(f"--cpus-per-task={cpus_per_rank(config.cluster)}")
    return options + config.cluster.srun_options


def _setup(config: Config, stage_dir: Path, code: Path | None) -> list[str]:
    """Shell lines before srun: the site's own, of which none may fail, then what every rank finds set."""
    lines = []
    if config.cluster.setup:
        # The exit trap tells of a line that fails inside a shell function too, which a trap on ERR does not.
        # No `set -u`: the scripts of modules and conda read variables that are not set.
        words = f"{SETUP_FAILED} with exit code $code: $BASH_COMMAND"
        failed = ["code=$?", f'echo "{words}" >&2', _aftermath(config, stage_dir, code)]
        lines += [
            "trap " + shlex.quote("\n".join(failed)) + " EXIT",
            "set -e",
            *config.cluster.setup,
            "set +e",
            "trap - EXIT",
        ]
    # The batch shell has to outlive a stop signal: when it ends, Slurm kills the ranks in the middle of their save.
    lines += ["trap : TERM USR2", "export PYTHONUNBUFFERED=1"]
    if config.parallel.threads_per_rank:
        lines.append(f"export OMP_NUM_THREADS={config.parallel.threads_per_rank}")
    if code is not None:
        # What a rank starts finds the snapshot too, not the code in the working directory.
        lines += [
            f'export PYTHONPATH={shlex.quote(str(code))}"${{PYTHONPATH:+:$PYTHONPATH}}"',
            "export PYTHONSAFEPATH=1",
        ]
    return lines


def _aftermath(config: Config, stage_dir: Path, code: Path | None) -> str:
    """The words that note in the stage folder how a job ended, whose exit code is in $code."""
    program = f"-m {AFTERMATH}" if code is None else f"{shlex.quote(str(code / 'job.py'))} -m {AFTERMATH}"
    attempt = '"$code" "$SLURM_JOB_ID" "${SLURM_RESTART_COUNT:-0}"'
    return f"{python_of(config)} {program} {shlex.quote(str(stage_dir))} {attempt}"
