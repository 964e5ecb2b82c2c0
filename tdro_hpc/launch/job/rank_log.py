"""Where the words of one rank go: log/rank<n>.log, our own notes on rank 0 only; and the mark of a new attempt."""

import logging
import os
import sys
from pathlib import Path

from tdro_hpc.launch.job.place import Place

ATTEMPT = "--- job {job} restart {restart}"


def mark_attempt(place: Place) -> None:
    """Say where this attempt begins in the file that srun writes its own lines to: see launch/job/aftermath.py."""
    if place.rank == 0:
        print(ATTEMPT.format(job=place.job, restart=place.restart), file=sys.stderr, flush=True)


def write_to(log: Path) -> None:
    """Append everything that this process and its children say to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]


def set_logging(place: Place) -> None:
    """Our own notes in the log of rank 0, warnings in all; of other packages, warnings only."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    # submitit tells on every rank that its job began and ended, twice.
    logging.getLogger("submitit").setLevel(logging.ERROR)
    logging.getLogger("tdro_hpc").setLevel(logging.INFO if place.rank == 0 else logging.WARNING)
