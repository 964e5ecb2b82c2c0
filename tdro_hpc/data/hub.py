"""A data set id of the Hugging Face hub in, local paths of its files out. Tokens are left to huggingface_hub."""

import logging
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import TypeVar

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


def list_files(dataset: str, *, revision: str) -> list[str]:
    """Paths of all files of a data set."""
    from huggingface_hub import HfApi

    return _asked(
        lambda: HfApi().list_repo_files(dataset, repo_type="dataset", revision=revision or None), "its files", dataset
    )


def fetch_file(dataset: str, name: str, *, revision: str) -> Path:
    """Local path of one file; fetched once, then read from huggingface_hub's cache.

    A name that the data set has in a folder (dedup/x.jsonl for x.jsonl) is found there when it is the only one.
    raises  ValueError naming the nearest file, or what to type when the hub does not answer
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    def download(path: str) -> Path:
        return Path(hf_hub_download(dataset, path, repo_type="dataset", revision=revision or None))

    def download_or_find() -> Path:
        try:
            return download(name)
        except LocalEntryNotFoundError:  # no connection and not in the cache: asking for a list would fail as well
            raise
        except EntryNotFoundError:
            return download(_found_in(list_files(dataset, revision=revision), name, dataset))

    return _asked(download_or_find, name, dataset)


def fetch_folder(dataset: str, folder: str, *, revision: str) -> Path:
    """Local path of one folder of a data set, with all that is in it."""
    from huggingface_hub import snapshot_download

    def download() -> str | list:
        return snapshot_download(
            dataset, repo_type="dataset", revision=revision or None, allow_patterns=[f"{folder}/**"]
        )

    path = Path(str(_asked(download, f"{folder}/", dataset))) / folder
    if not path.is_dir():
        raise ValueError(f"The hub data set {dataset} has no folder {folder!r}. See: hf download {dataset} --dry-run")
    return path


def _found_in(paths: list[str], name: str, dataset: str) -> str:
    same = [path for path in paths if path.rsplit("/", 1)[-1] == name]
    if len(same) == 1:
        return same[0]
    near = same or get_close_matches(name, paths, n=3)
    hint = f" Nearest: {', '.join(near)}." if near else ""
    raise ValueError(f"The hub data set {dataset} has no file {name!r}.{hint} Set `file` of the task to a path in it.")


def _asked(request: Callable[[], Result], what: str, dataset: str) -> Result:
    """The answer of the hub, or a ValueError with what to do. The hub's own words may hold signed addresses."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    transport_error = HfHubHTTPError.__bases__[0]  # of the HTTP client, which is another one in each huggingface_hub
    try:
        return request()
    except (transport_error, LocalEntryNotFoundError, ConnectionError) as error:  # type: ignore[misc]
        raise ValueError(
            f"{what} of the hub data set {dataset} could not be fetched ({type(error).__name__}). "
            f"On a machine with a connection: hf download {dataset} --repo-type dataset --local-dir <folder>, "
            "then data.dir=<folder>. A gated data set needs: hf auth login."
        ) from None
