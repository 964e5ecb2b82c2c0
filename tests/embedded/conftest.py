from pathlib import Path
from typing import Any

import pytest

from tdro_hpc.config.schema import EmbeddedConfig
from tdro_hpc.embedded import build, sources

# Enough for every task, and a second of parsing: these two are wherever the tests run.
SMALL_PACKAGES = {"standard library": 500_000, "numpy": 400_000}
SMALL = EmbeddedConfig(max_rows_per_task=60, test_queries=20, test_documents=80, hard_negatives=4)


@pytest.fixture(scope="session")
def library() -> sources.Library:
    return sources.read_library(SMALL_PACKAGES)


@pytest.fixture(scope="session")
def built(library: sources.Library, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("embedded")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "read_library", lambda: library)
        return folder, build.build_embedded(folder, SMALL, seed=7)
