"""Hands the jobs of stages to Slurm through submitit, and takes them back; what Slurm refuses is said in its words."""

import contextlib
import io
import re
import runpy
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tdro_hpc.atomic import write_text
from tdro_hpc.config.schema import Config
from tdro_hpc.launch.commands import Outcome, run_command
from tdro_hpc.launch.local.executor import JobOf
from tdro_hpc.launch.slurm.sbatch import executor_for, sbatch_command, sbatch_script, slurm_folder
from tdro_hpc.launch.stage import Stage

JOB_SCRIPT = "job.sbatch"
_PICKLE_SECONDS = 30.0  # between sbatch's answer and the pickle; network disks show new files late
_REFUSALS = (
    (
        r"invalid partition|partition .*not available|partition is|use this partition",
        "cluster.partition (see: sinfo -s)",
    ),
    (
        r"invalid account|account/partition combination",
        "cluster.account, cluster.partition or cluster.qos (see: sacctmgr show associations user=$USER)",
    ),
    (
        r"qos|AssocGrp|AssocMax|submit limit",
        "cluster.qos, ask for less at a time (cluster.nodes, cluster.gpus_per_node), or wait for your other jobs",
    ),
    (r"time limit|timelimit", "cluster.time_limit (see: sinfo -o '%P %l')"),
    (
        r"invalid (generic resource|gres|trestype)|\bgres\b",
        "cluster.gpu_type, cluster.gpu_request or cluster.gpus_per_node",
    ),
    (r"invalid feature", "cluster.constraint (see: sinfo -o '%N %f')"),
    (r"invalid node name", "cluster.exclude"),
    (
        r"node configuration is not available|more processors|memory (specification|required)|node count",
        "cluster.nodes, cluster.gpus_per_node, cluster.gpu_type, cluster.node_cpus or cluster.node_memory_gb "
        "(see: sinfo -N -l)",
    ),
    (r"(unrecognized|invalid|unknown) option|unrecognized argument", "cluster.sbatch_options"),
)


class FailedSubmission(ValueError):
    """A job that sbatch refused."""

    def __init__(self, stage: str, command: str, words: str) -> None:
        hint = hint_for(words)
        super().__init__(
            "\n".join(filter(None, [f"{stage} was not submitted.", words, hint, f"The command was: {command}"]))
        )
        self.command = command  # what to type to see it again
        self.words = words  # what sbatch said


def submit_job(
    config: Config,
    stage: Stage,
    stage_dir: Path,
    *,
    ranks: int,
    code: Path | None,
    job_of: JobOf,
    after: Sequence[str],
    link_before: str,
    link: int,
) -> str:
    """Submit the job of a stage; its id. Leaves <stage>/job.sbatch and what submitit keeps in <stage>/log/slurm.

    stage_dir   absolute; config.yaml is in it
    code        folder of take_snapshot; None = the code as it is when the job starts
    after       ids of jobs that have to end well before
    link_before id of the link before this one, which may end in any way; empty = none
    link        which of the jobs in a row under cluster.requeue=links, from 1
    raises      FailedSubmission with sbatch's words
    """
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    script = stage_dir / JOB_SCRIPT
    command = shlex.join(sbatch_command(script, after=after, link_before=link_before))
    if shutil.which("sbatch") is None:
        raise FailedSubmission(stage.name, command, "sbatch is not installed here")
    executor = executor_for(
        config, stage, stage_dir, ranks=ranks, code=code, link=link, after=after, link_before=link_before
    )
    if link == 1:  # those of the other links differ in nothing but the name of the job
        write_text(script, sbatch_script(config, stage, stage_dir, ranks=ranks, code=code))
    folder = slurm_folder(stage_dir)
    folder.mkdir(parents=True, exist_ok=True)
    before = set(folder.iterdir())
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # submitit prints sbatch's words besides raising them
            return executor.submit(job_of(stage_dir, stage.kind)).job_id
    except (FailedJobError, FailedSubmissionError) as error:
        for file in set(folder.iterdir()) - before:
            file.unlink()
        raise FailedSubmission(stage.name, command, _words_of(error)) from None


def test_submission(
    config: Config, stage: Stage, stage_dir: Path, *, ranks: int, code: Path | None, link: int = 1
) -> Outcome:
    """What sbatch says to the job of a stage without submitting it; writes nothing in the run directory."""
    with tempfile.TemporaryDirectory(prefix="tdro-hpc-") as folder:
        script = Path(folder, JOB_SCRIPT)
        script.write_text(sbatch_script(config, stage, stage_dir, ranks=ranks, code=code, link=link), encoding="utf-8")
        return run_command(["sbatch", "--test-only", str(script)])


def cancel_jobs(jobs: Sequence[str], *, signal: str = "") -> Outcome:
    """Take jobs out of the queue, or send the ranks of running ones a signal such as USR2."""
    if not jobs:
        return Outcome(0, "", "")
    return run_command(["scancel", *([f"--signal={signal}"] if signal else []), *jobs])


def run_submitted(folder: Path) -> None:
    """Run the stage of this job, on one of its ranks: what submitit pickled for it in `folder`, <stage>/log/slurm.

    A script that a person gave to sbatch has no pickle: the stage is run by its folder then, as by hand.
    """
    from submitit.core.submission import submitit_main
    from submitit.core.utils import JobPaths
    from submitit.slurm.slurm import SlurmJobEnvironment

    pickle = JobPaths(folder, job_id=SlurmJobEnvironment().job_id).submitted_pickle
    deadline = time.monotonic() + _PICKLE_SECONDS
    # The pickle gets the name of the job when sbatch has told it, which may be after the job has begun.
    while not pickle.exists():
        if time.monotonic() > deadline:
            sys.argv = ["tdro_hpc.run", str(folder.parent.parent)]
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
            return
        time.sleep(0.2)
    submitit_main()


def hint_for(words: str) -> str:
    """Which key to change when sbatch refuses a job with these words; empty when they are not known."""
    for pattern, keys in _REFUSALS:
        if re.search(pattern, words, flags=re.IGNORECASE):
            return f"Change {keys}."
    if re.search(r"unable to contact|connect failure|temporarily unable|timed out", words, flags=re.IGNORECASE):
        return "Slurm's controller does not answer. Type the same line again in a few minutes."
    if "not installed here" in words:
        return "Type the line on a login node of the cluster, or cluster=local to run the stages on this machine."
    return ""


def _words_of(error: Exception) -> str:
    """sbatch's own words, without what submitit says around them."""
    words = re.sub(r'(?s)^Could not make sense of sbatch output "(.*)"\nJob instance will.*$', r"\1", str(error))
    return words.strip() or "sbatch said nothing"
