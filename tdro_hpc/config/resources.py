"""The machines of a profile in, CPUs and memory of a job out: a person types nodes and GPUs only. Pure."""

from tdro_hpc.config.cluster import ClusterConfig


def ranks_per_node(cluster: ClusterConfig) -> tuple[int, str]:
    """Processes on one node, and the key that says so."""
    if cluster.ranks_per_node:
        return cluster.ranks_per_node, "ranks_per_node"
    if cluster.gpus_per_node:
        return cluster.gpus_per_node, "gpus_per_node"
    return 1, "rank a node (no GPU)"


def ranks_of_job(cluster: ClusterConfig) -> int:
    """Processes on all nodes of a job."""
    return cluster.nodes * ranks_per_node(cluster)[0]


def gpus_of_job(cluster: ClusterConfig, stage_ranks: str = "all") -> int:
    """GPUs of a job on each of its nodes.

    stage_ranks   all = every rank of the profile; one = a single process, which gets the share of one rank
    """
    if stage_ranks == "one":
        return -(-cluster.gpus_per_node // ranks_per_node(cluster)[0])
    return cluster.gpus_per_node


def cpus_per_rank(cluster: ClusterConfig) -> int:
    """CPUs of one task, at least 1; 0 = nothing is asked for, the site decides."""
    if not cluster.node_cpus:
        return 0
    given, node = _share(cluster)
    return max(1, cluster.node_cpus * given // (node * ranks_per_node(cluster)[0]))


def memory_per_node_gb(cluster: ClusterConfig, stage_ranks: str = "all") -> int:
    """Memory of a job on each of its nodes (GB), at least 1; 0 = nothing is asked for, the site decides."""
    if not cluster.node_memory_gb:
        return 0
    given, node = _share(cluster)
    ranks = ranks_per_node(cluster)[0] if stage_ranks == "one" else 1
    return max(1, int(cluster.node_memory_gb * given / (node * ranks)))


def cpus_equation(cluster: ClusterConfig) -> str:
    """CPUs of one rank and what is multiplied."""
    exact = cluster.node_cpus * _share(cluster)[0] / _share(cluster)[1] / ranks_per_node(cluster)[0]
    product = f"{cluster.node_cpus:,} node_cpus{_share_words(cluster)}{_rank_words(cluster)}"
    return f"CPUs per rank {cpus_per_rank(cluster):,} = {product}{_rounding(cpus_per_rank(cluster), exact)}"


def memory_equation(cluster: ClusterConfig, stage_ranks: str = "all") -> str:
    """Memory of a job on one node and what is multiplied."""
    given, node = _share(cluster)
    exact = cluster.node_memory_gb * given / node
    product = f"{cluster.node_memory_gb:,g} node_memory_gb{_share_words(cluster)}"
    if stage_ranks == "one":
        exact /= ranks_per_node(cluster)[0]
        product += _rank_words(cluster)
    memory = memory_per_node_gb(cluster, stage_ranks)
    return f"memory per node {memory:,} GB = {product}{_rounding(memory, exact)}"


def resource_lines(cluster: ClusterConfig, stage_ranks: str = "all") -> list[str]:
    """Equations of what a Slurm job asks for on a node; none for figures that the site decides, or on this machine."""
    if cluster.executor != "slurm":
        return []
    lines = [cpus_equation(cluster)] if cluster.node_cpus else []
    return lines + ([memory_equation(cluster, stage_ranks)] if cluster.node_memory_gb else [])


def _share(cluster: ClusterConfig) -> tuple[int, int]:
    """The part of a node that a job takes, as (GPUs of the job, GPUs of the node); without GPUs all of it."""
    if cluster.node_gpus and cluster.gpus_per_node:
        return cluster.gpus_per_node, cluster.node_gpus
    return 1, 1


def _share_words(cluster: ClusterConfig) -> str:
    if cluster.node_gpus and cluster.gpus_per_node:
        return f" x {cluster.gpus_per_node:,} gpus_per_node / {cluster.node_gpus:,} node_gpus"
    return ""


def _rank_words(cluster: ClusterConfig) -> str:
    ranks, key = ranks_per_node(cluster)
    return f" / {ranks:,} {key}"


def _rounding(figure: int, exact: float) -> str:
    return "" if figure == exact else ", rounded down" if figure < exact else ", but at least 1"
