"""A finished model folder in, one commit on the Hugging Face hub out. Writes no file and knows nothing of runs.

Large files go up first, one after the other. The hub keeps them by their content: none is sent twice, also after a
break. The commit that shows them comes last; before it nothing is published. The token is read and sent by
huggingface_hub, from the environment or its own login.
"""

import logging
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from tdro_hpc.report.hub_words import Problem, hub_speaks_through, problem_of, token_in_use

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_ALONE_BYTES = 10 * 2**20  # a file of this size goes up by itself, with a line in the log
# Files that decide which weights are loaded: one that an earlier push left would be loaded instead of, or beside, ours.
_WEIGHTS = re.compile(r"[^/]+\.safetensors|[^/]+\.safetensors\.index\.json|pytorch_model[^/]*|adapter_config\.json")


@dataclass(frozen=True)
class Patience:
    """How long a push waits for a hub that does not answer."""

    tries: int = 6  # of each request; huggingface_hub makes up to 6 of its own in each of those that send files
    first_wait_seconds: float = 5.0  # doubled with every try
    longest_wait_seconds: float = 60.0
    longest_asked_seconds: float = 900.0  # a hub that asks for more (Retry-After) is not waited for
    answer_seconds: float = 300.0  # without a byte in either direction, then the connection counts as broken
    sleep: Callable[[float], None] = time.sleep


@dataclass(frozen=True)
class _Target:
    """A repository as it was when it was looked at."""

    commit: str
    files: tuple[str, ...]


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    private: bool,
    message: str,
    before_each: Callable[[], None] = lambda: None,
    patience: Patience | None = None,
) -> str:
    """Address of the commit that holds all files of `folder`; that of the newest commit when it has them already.

    folder       all its files go up except hidden ones; nothing in it is changed
    repo_id      organisation/name or user/name; made when it is not there
    private      for a repository that is made here. One that is there and public is refused when this is set
    before_each  called before every large file and every try; what it raises ends the push
    raises       ValueError with what to type; nothing is published then
    """
    patience = patience or Patience()
    check_repo_id(repo_id)
    paths = _files_of(folder)
    with hub_speaks_through(logger):
        return _Push(folder, paths, repo_id, private, patience, before_each).run(message)


def check_repo_id(repo_id: str) -> None:
    """raises ValueError when the hub can have no model of this name in anybody's account."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
        fits = "/" in repo_id
    except HFValidationError:
        fits = False
    if not fits:
        raise ValueError(
            f"{repo_id!r} is no name of a model on the hub. Set export.push=organisation/name or user/name, "
            "of letters, digits, `-`, `_` and `.`, without `--` and `..`."
        )


class _Push:
    """One push: what is asked of the hub, in order."""

    def __init__(
        self,
        folder: Path,
        paths: list[str],
        repo_id: str,
        private: bool,
        patience: Patience,
        before_each: Callable[[], None],
    ) -> None:
        from huggingface_hub import HfApi

        self.before_each = before_each
        self.folder, self.paths, self.repo_id, self.private, self.patience = folder, paths, repo_id, private, patience
        # True = a request without a token is refused here, in words; False would send it without.
        self.api = HfApi(token=True)
        self.sizes = {path: (folder / path).stat().st_size for path in paths}

    def run(self, message: str) -> str:
        """Address of the commit."""
        _refuse_token_in_files(self.folder, self.paths)
        self._tried("make the repository", self._create)
        target = self._tried("look at the repository", self._look)
        additions = self._additions()
        self._upload(additions)
        ready = [(target, additions)]

        def commit() -> tuple[str, bool]:
            # After a failure everything is looked at anew: the commit may have been made and only its answer lost.
            target_now, additions_now = ready.pop() if ready else (self._look(), self._additions(additions))
            return self._commit(target_now, additions_now, message)

        address, is_new = self._tried("commit", commit)
        if is_new:
            logger.info("Pushed: %s", address)
        else:
            logger.info("%s has these files already: no new commit", self.repo_id)
        return address

    def _create(self) -> None:
        self.api.create_repo(self.repo_id, private=self.private, exist_ok=True)

    def _look(self) -> _Target:
        found = self.api.model_info(self.repo_id)
        if self.private and not found.private:
            raise _Refusal(
                f"{self.repo_id} is on the hub already and public, and export.private is true. Type: "
                f"hf repos settings {self.repo_id} --private, or set export.private=false, or another export.push."
            )
        if found.private and not self.private:
            logger.info("%s is private on the hub and stays so", self.repo_id)
        assert found.sha is not None, f"the hub tells no commit of {self.repo_id}"
        return _Target(found.sha, tuple(file.rfilename for file in found.siblings or ()))

    def _additions(self, before: Sequence["CommitOperationAdd"] = ()) -> list["CommitOperationAdd"]:
        """What is to be added. before = the same, used up: their checksums need no second reading."""
        from huggingface_hub import CommitOperationAdd

        additions = [CommitOperationAdd(path, self.folder / path) for path in self.paths]
        for addition, former in zip(additions, before, strict=False):
            addition.upload_info = former.upload_info
        return additions

    def _upload(self, additions: list["CommitOperationAdd"]) -> None:
        """Put the content of large files on the hub, where nobody sees it yet."""
        total, place = sum(self.sizes.values()), f"{self.api.endpoint}/{self.repo_id}"
        logger.info("Push of %d files, %s, to %s", len(additions), _gigabytes(total), place)
        began, sent, number = time.monotonic(), 0, 0
        for group in self._groups(additions):
            self._tried(f"send {group[-1].path_in_repo}", partial(self._send, group))
            sent, number = sent + sum(self.sizes[one.path_in_repo] for one in group), number + len(group)
            words = (number, len(additions), _gigabytes(sent), _gigabytes(total), time.monotonic() - began)
            logger.info("On the hub: %d of %d files, %s of %s after %.0f s", *words)
        left_out = [addition.path_in_repo for addition in additions if addition._should_ignore]
        if left_out:
            raise ValueError(
                f"The .gitignore of {self.repo_id} leaves out {', '.join(left_out)}. Nothing was published. Type: "
                f"hf repos delete-files {self.repo_id} .gitignore, then the same line again."
            )

    def _send(self, group: list["CommitOperationAdd"]) -> None:
        # An empty .gitignore: one that lies in the repository must not leave files of a model out.
        self.api.preupload_lfs_files(self.repo_id, group, gitignore_content="", free_memory=False)

    def _groups(self, additions: list["CommitOperationAdd"]) -> list[list["CommitOperationAdd"]]:
        """All small files together, then the large ones, each by itself."""
        small = [one for one in additions if self.sizes[one.path_in_repo] < _ALONE_BYTES]
        large = [[one] for one in additions if self.sizes[one.path_in_repo] >= _ALONE_BYTES]
        return ([small] if small else []) + large

    def _commit(self, target: _Target, additions: list["CommitOperationAdd"], message: str) -> tuple[str, bool]:
        """(address of the commit, whether it is a new one)."""
        from huggingface_hub import CommitOperationCopy, CommitOperationDelete

        stale = [path for path in target.files if _WEIGHTS.fullmatch(path) and path not in self.sizes]
        if stale:
            logger.info("Removed in the same commit, of an earlier model: %s", ", ".join(stale))
        operations: list[CommitOperationAdd | CommitOperationCopy | CommitOperationDelete] = list(additions)
        operations += [CommitOperationDelete(path) for path in stale]
        # The commit before is named: of two pushes at a time, and of one that is sent again, only one can succeed.
        made = self.api.create_commit(self.repo_id, operations, commit_message=message, parent_commit=target.commit)
        return made.commit_url, made.oid != target.commit

    def _tried(self, what: str, request: Callable[[], Result]) -> Result:
        """The answer of a request, made again while what it fails with may pass."""
        from huggingface_hub.utils import get_session

        patience, wait = self.patience, self.patience.first_wait_seconds
        for number in range(1, patience.tries + 1):
            self.before_each()
            # Without a limit a connection that broke without a word is waited for as long as the job lasts.
            get_session().timeout = patience.answer_seconds
            try:
                return request()
            except _Refusal as refusal:
                raise ValueError(str(refusal)) from None
            except Exception as error:  # whatever it is, its text may hold the token
                problem = problem_of(error)
            pause = wait if problem.wait_seconds is None else problem.wait_seconds
            if not problem.passes or number == patience.tries or pause > patience.longest_asked_seconds:
                raise ValueError(self._failed_words(what, problem, number))
            logger.warning(
                "Failed to %s (%s). Try %d of %d in %.0f s",
                what,
                _short(problem),
                number + 1,
                patience.tries,
                pause,
            )
            patience.sleep(pause)
            wait = min(wait * 2, patience.longest_wait_seconds)
        raise AssertionError("the last try returns or raises")

    def _failed_words(self, what: str, problem: Problem, tries: int) -> str:
        """What happened, what that leaves, what to type."""
        begin = f"{self.folder} could not be pushed to {self.repo_id}: failed to {what} ({_short(problem)})"
        owner = self.repo_id.split("/")[0]
        again = "The folder is complete; the same line again goes on with the push, and sends nothing twice."
        if problem.status == 401:
            return (
                f"{begin}. Nothing was published. Type: hf auth login (or set HF_TOKEN), with a token that may write "
                f"to {owner}. {again}"
            )
        if problem.status in (403, 404):
            return (
                f"{begin}. Nothing was published. The token needs write access to {owner}: hf auth whoami tells whose "
                f"it is; make another at {self.api.endpoint}/settings/tokens and type: hf auth login. {again}"
            )
        published = "Nothing was published."
        if what == "commit" and problem.passes:
            published = "Whether the commit was made is not known, its answer was lost: the same line finds out."
        asked = problem.wait_seconds or 0
        later = f" The hub asks to wait {asked:.0f} s." if asked > self.patience.longest_asked_seconds else ""
        times = f" after {tries} tries" if tries > 1 else ""
        place = ""
        if not problem.status and problem.passes:
            place = " Where the nodes have no connection, type it with cluster=local on a machine that has one."
        return f"{begin}{times}.{later} {published} {again}{place}"


class _Refusal(Exception):
    """A reason of ours not to push, in words."""


def _short(problem: Problem) -> str:
    return ": ".join(filter(None, [f"answer {problem.status}" if problem.status else "", problem.words])) or "no words"


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"


def _files_of(folder: Path) -> list[str]:
    """Paths of the files of a folder, hidden ones left out.

    raises ValueError when there are none
    """
    found = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    paths = [path.as_posix() for path in found if not any(part.startswith(".") for part in path.parts)]
    if not paths:
        raise ValueError(f"{folder} has no files to push. Make it first: stage=export.")
    return paths


def _refuse_token_in_files(folder: Path, paths: list[str]) -> None:
    """raises ValueError when a small file holds the token: a line of cluster.setup may have brought it there."""
    token = token_in_use().encode()
    for path in paths if token else ():
        if (folder / path).stat().st_size < _ALONE_BYTES and token in (folder / path).read_bytes():
            raise ValueError(
                f"{folder / path} holds the token of the hub, so nothing was pushed. It may come from a line of "
                "cluster.setup: take it out there, withdraw the token, type: hf auth login, and export again."
            )
