"""The machines that a stage gets, and how a job asks for them: the section `cluster` of the schema."""

import dataclasses
import re
from dataclasses import dataclass, field

from tdro_hpc.config.bounds import at_least, one_of, require

_TIME_LIMIT = re.compile(r"(?:(\d+)-)?(\d{1,2}):(\d{2}):(\d{2})")
_OF_BOTH = (
    "executor",
    "nodes",
    "gpus_per_node",
    "ranks_per_node",
    "gpu_memory_gb",
)  # keys that cluster.executor=local has too


@dataclass(frozen=True)
class ClusterConfig:
    """The machines that a stage gets. All but the first five keys are of Slurm."""

    executor: str = "local"  # local = processes on this machine; slurm = jobs, submitted with sbatch
    nodes: int = 1  # machines of one stage; 1 with executor=local
    gpus_per_node: int = 0  # 0 = no GPU
    ranks_per_node: int = 0  # processes on one node; 0 = gpus_per_node, or 1 without GPUs
    gpu_memory_gb: float = 0.0  # memory of one GPU as on its data sheet, for checks before the start; 0 = not known
    partition: str = ""  # empty = the site's default; so for the next four
    account: str = ""  # who pays
    qos: str = ""  # quality of service
    constraint: str = ""  # features that the nodes must have, such as a100
    exclude: str = ""  # nodes to stay away from, such as node[07,12]
    gpu_request: str = "gpus"  # gpus = --gpus-per-node, gres = --gres=gpu, for sites that know only that
    gpu_type: str = ""  # such as a100 where the site has several
    node_gpus: int = 0  # GPUs of a whole node; a job gets the share gpus_per_node / node_gpus of what follows
    node_cpus: int = 0  # CPUs of a whole node that a job may have; 0 = the site's default
    node_memory_gb: float = 0.0  # memory of a whole node that a job may have; 0 = the site's default
    time_limit: str = "04:00:00"  # of one job, [days-]hours:minutes:seconds; a stage that needs longer is requeued
    stop_lead_seconds: int = 300  # the job is told so long before the limit; twice a step and a save fit into it
    requeue: str = "self"  # self = a stopped job puts itself back; links = jobs in a row, where requeue is forbidden
    max_restarts: int = 20  # times that a stage may go on after a stop; with requeue=links that many links wait
    python: str = ""  # how jobs call Python, as in: apptainer exec --nv a.sif python; empty = as submit was called
    setup: list[str] = field(default_factory=list)  # shell lines before the job: modules, conda, cache folders
    srun_options: list[str] = field(default_factory=list)  # such as --container-image=nvcr.io/nvidia/pytorch (Pyxis)
    sbatch_options: list[str] = field(default_factory=list)  # such as --exclusive or --licenses=scratch
    snapshot: bool = True  # jobs run from a copy of the code as it was when they were submitted
    mail_user: str = ""  # address; empty = no mail
    mail_types: str = "FAIL,INVALID_DEPEND"  # what is mailed: sbatch --mail-type

    def __post_init__(self) -> None:
        require(
            one_of("cluster.executor", self.executor, ("local", "slurm"))
            + at_least("cluster.nodes", self.nodes, 1, "1 to 4")
            + at_least("cluster.gpus_per_node", self.gpus_per_node, 0, "0 to 8")
            + at_least("cluster.ranks_per_node", self.ranks_per_node, 0, "0")
            + at_least("cluster.gpu_memory_gb", self.gpu_memory_gb, 0, "24 to 141")
            + one_of("cluster.gpu_request", self.gpu_request, ("gpus", "gres"))
            + at_least("cluster.node_gpus", self.node_gpus, 0, "4 to 8")
            + at_least("cluster.node_cpus", self.node_cpus, 0, "32 to 256")
            + at_least("cluster.node_memory_gb", self.node_memory_gb, 0, "240 to 2000")
            + one_of("cluster.requeue", self.requeue, ("self", "links"))
            + at_least("cluster.max_restarts", self.max_restarts, 0, "5 to 50")
            + at_least("cluster.stop_lead_seconds", self.stop_lead_seconds, 1, "120 to 600")
            + self._time_problems()
            + self._share_problems()
            + self._option_problems()
            + self._executor_problems()
        )

    @property
    def time_limit_seconds(self) -> int:
        """The time limit of one job (s)."""
        match = _TIME_LIMIT.fullmatch(self.time_limit)
        assert match, "a time limit that cannot be read is refused when the config is made"
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
        return ((days * 24 + hours) * 60 + minutes) * 60 + seconds

    def _time_problems(self) -> list[str]:
        if not _TIME_LIMIT.fullmatch(self.time_limit) or self.time_limit_seconds < 60:
            return [
                f"cluster.time_limit is {self.time_limit!r}; it must be [days-]hours:minutes:seconds, >= 1 minute. "
                "Type cluster.time_limit=04:00:00."
            ]
        if self.executor == "slurm" and self.stop_lead_seconds >= self.time_limit_seconds:
            return [
                f"cluster.stop_lead_seconds is {self.stop_lead_seconds}, not less than "
                f"cluster.time_limit={self.time_limit}: a job would be told to stop when it starts. "
                f"Type cluster.stop_lead_seconds={self.time_limit_seconds // 10}."
            ]
        return []

    def _share_problems(self) -> list[str]:
        if not 0 < self.node_gpus < self.gpus_per_node:
            return []
        return [
            f"cluster.gpus_per_node is {self.gpus_per_node}, but a node has cluster.node_gpus={self.node_gpus}. "
            f"Type cluster.gpus_per_node={self.node_gpus} cluster.nodes={-(-self.gpus_per_node // self.node_gpus)}."
        ]

    def _option_problems(self) -> list[str]:
        return [
            f"cluster.{key} holds {option!r}; an option begins with two dashes and brings its value with it, as in "
            f"{usual}. Type 'cluster.{key}=[{usual}]'."
            for key, options, usual in (
                ("srun_options", self.srun_options, "--container-image=image.sqsh"),
                ("sbatch_options", self.sbatch_options, "--licenses=scratch"),
            )
            for option in options
            if not re.match(r"--[a-z]", option)
        ]

    def _executor_problems(self) -> list[str]:
        if self.executor != "local":
            return []
        if self.nodes != 1:
            return [f"cluster.nodes is {self.nodes}; cluster=local has one node. Set cluster.nodes=1."]
        # A key that would be read by nobody is a mistake that has to be said.
        given = [
            item.name
            for item in dataclasses.fields(self)
            if item.name not in _OF_BOTH and getattr(self, item.name) != _default_of(item)
        ]
        if not given:
            return []
        names = " and ".join(f"cluster.{name}" for name in given)
        return [
            f"{names} {'is' if len(given) == 1 else 'are'} given, which only Slurm reads, but cluster.executor is "
            "'local'. Type cluster=slurm for jobs on a cluster, or leave it out."
        ]


def _default_of(item: dataclasses.Field) -> object:
    return item.default_factory() if item.default_factory is not dataclasses.MISSING else item.default
