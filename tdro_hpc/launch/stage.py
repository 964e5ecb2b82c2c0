"""What one stage of a run needs and makes, as plain data."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """One node of the chain. `name` is also its folder in the run directory."""

    name: str  # s0, s1, s2-curr, eval ...
    kind: str  # prepare, s0, s1, s2, eval, export: the module of tdro_hpc.stages that runs it
    needs: tuple[str, ...]  # names of stages whose DONE.json must exist
    makes: tuple[str, ...]  # paths under <stage>/out that DONE.json lists with their sizes
    sections: tuple[str, ...]  # config sections that change its results: the keys that DONE.json hashes
    ranks: str = "all"  # all = every rank of the cluster profile; one = a single process
    files: tuple[str, ...] = ()  # files outside the run whose content changes its results
    trains: bool = False  # it trains a model, on the mesh of parallel.pp, dp and tp; else every rank reads data
    follows: tuple[str, ...] = ()  # stages that it lets go first where the same plan runs them, but does not need
