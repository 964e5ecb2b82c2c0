"""One real Slurm for the tests of this folder. Without root they are skipped, in words; on a CI machine never."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster, running_cluster
from tests.cluster.user import User


@pytest.fixture(scope="session")
def real_cluster() -> Iterator[Cluster]:
    """Four nodes, preemption with requeue, no accounting."""
    if os.geteuid() != 0:
        words = "tests on a real Slurm need root: sudo python -m pytest tests/cluster"
        pytest.fail(words) if os.environ.get("CI") else pytest.skip(words)
    with running_cluster(nodes=4) as cluster:
        yield cluster


@pytest.fixture
def user(real_cluster: Cluster) -> Iterator[User]:
    """A person with an empty folder; what is left of their jobs is cancelled at the end."""
    # Not tmp_path: jobs of other users and other nodes have to reach it.
    folder = Path(tempfile.mkdtemp(prefix="tdro-user-", dir="/var/tmp"))
    folder.chmod(0o755)
    person = User(real_cluster, folder)
    try:
        yield person
    finally:
        person.cancel_everything()
        shutil.rmtree(folder, ignore_errors=True)
