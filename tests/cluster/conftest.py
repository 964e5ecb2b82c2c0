"""One real Slurm for the tests of this folder. Without root they are skipped, in words; on a CI machine never."""

import os
from collections.abc import Iterator

import pytest

from tests.cluster.cluster import Cluster, running_cluster
from tests.cluster.user import User, person_on


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
    with person_on(real_cluster) as person:
        yield person
