"""A model folder is pushed to a stand-in of the hub: one commit or none, nothing twice, the token nowhere."""

import hashlib
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import lfs
from huggingface_hub.utils import _http, close_session

from tdro_hpc.config.load import load_config
from tdro_hpc.launch.slurm.sbatch import sbatch_script
from tdro_hpc.report import hub as pushing
from tdro_hpc.report.hub import Patience, check_repo_id, push_folder
from tdro_hpc.report.hub_words import scrub
from tdro_hpc.stages.graph import stage_graph
from tests.report.hub_server import STORAGE_KEY, Fault, Hub, running_hub

ROOT = Path(__file__).parents[2]
TOKEN = "hf_thisIsTheTokenOfThePush0123"
REPO = "lab/model"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
SHARD_BYTES = 300_000


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A stand-in that this process takes for the hub; large files go by LFS."""
    with running_hub() as hub:
        hub.tokens[TOKEN] = "write"
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "login"))
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(pushing, "_ALONE_BYTES", SHARD_BYTES)
        yield hub
        close_session()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that were asked to be slept, by us and inside huggingface_hub; nobody sleeps."""
    seconds: list[float] = []
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=seconds.append))
    return seconds


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


@pytest.fixture
def push(folder: Path, waits: list[float]) -> Callable[..., str]:
    patience = Patience(tries=3, first_wait_seconds=7.0, answer_seconds=0.5, sleep=waits.append)
    return partial(push_folder, folder, REPO, private=True, message="from s2", patience=patience)


def write_model(folder: Path) -> Path:
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: mit\n---\nA model.\n")
    (folder / "config.json").write_text("{}")
    (folder / "1_Pooling" / "config.json").write_text('{"word_embedding_dimension": 8}')
    (folder / ".model.safetensors.123").write_text("half a file")
    for number, name in enumerate(SHARDS):
        (folder / name).write_bytes(bytes([number]) * SHARD_BYTES)
    return folder


def published(hub: Hub) -> set[str]:
    """What a visitor of the repository sees of ours."""
    return set(hub.repositories[REPO].files) - {".gitattributes"}


def test_push_makes_one_commit_with_every_file_and_gives_its_address(hub, push, caplog):
    caplog.set_level(logging.INFO)
    address = push()
    repository = hub.repositories[REPO]
    assert repository.private and repository.messages == ["from s2"]
    assert published(hub) == {"README.md", "config.json", "1_Pooling/config.json", *SHARDS}
    assert repository.contents["README.md"].endswith(b"A model.\n")
    assert hub.bytes_stored() == 2 * SHARD_BYTES
    assert address == f"{hub.url}/{REPO}/commit/{repository.commits[-1]}"
    assert "On the hub: 4 of 5 files" in caplog.text and "5 of 5 files" in caplog.text and address in caplog.text


def test_second_push_sends_nothing_and_makes_no_empty_commit(hub, push, caplog):
    caplog.set_level(logging.INFO)
    address = push()
    stored = hub.bytes_stored()
    assert push() == address
    assert hub.bytes_stored() == stored and len(hub.repositories[REPO].messages) == 1
    assert f"{REPO} has these files already: no new commit" in caplog.text


def test_changed_file_alone_is_sent_and_stale_weights_go_in_the_same_commit(hub, push, folder):
    push()
    stored = hub.bytes_stored()
    hub.repositories[REPO].files["photo.png"] = "0"
    for name in SHARDS:
        (folder / name).unlink()
    (folder / "model.safetensors").write_bytes(b"x" * SHARD_BYTES)
    push()
    assert published(hub) == {"README.md", "config.json", "1_Pooling/config.json", "model.safetensors", "photo.png"}
    assert hub.bytes_stored() - stored == SHARD_BYTES and len(hub.repositories[REPO].messages) == 2


@pytest.mark.parametrize("path", ["/api/repos/create", "/preupload/", "/objects/batch", "^/storage/", "/commit/"])
def test_hub_that_asks_for_patience_twice_is_waited_for_as_long_as_it_asks(hub, push, waits, path):
    hub.faults = [Fault("PUT" if "storage" in path else "POST", path, 2, status=429, headers={"Retry-After": "11"})]
    push()
    assert waits in ([11.0, 11.0], [12.0, 12.0])  # huggingface_hub adds a second to its own
    assert len(hub.repositories[REPO].messages) == 1


def test_rate_limit_that_is_used_up_is_waited_for(hub, push, waits):
    limits = {"RateLimit": '"api";r=0;t=33', "Retry-After": "1"}, {"RateLimit": '"api";r=10;t=34'}
    hub.faults = [Fault("POST", "/api/repos/create", status=429, headers=headers) for headers in limits]
    push()
    assert waits == [33.0, 14.0]


def test_hub_that_asks_for_more_than_anybody_waits_is_left(hub, push, waits):
    hub.faults = [Fault("POST", "/api/repos/create", 9, status=429, headers={"Retry-After": "7200"})]
    with pytest.raises(ValueError, match="answer 429.*The hub asks to wait 7200 s. Nothing was published"):
        push()
    assert waits == [] and hub.repositories == {}


@pytest.mark.parametrize("path", ["/api/repos/create", "/commit/"])
def test_hub_that_is_out_of_order_is_given_up_after_the_tries(hub, push, waits, path):
    hub.faults = [Fault("POST", path, 99, status=500)]
    with pytest.raises(ValueError, match=r"answer 500\) after 3 tries"):
        push()
    assert waits == [7.0, 14.0] and len(hub.requests("POST", path)) == 3
    assert not hub.repositories or published(hub) == set()


def test_connection_that_breaks_in_an_upload_goes_on_with_that_file(hub, push):
    hub.faults = [Fault("PUT", "^/storage/", after_bytes=100_000)]
    push()
    sent = [one.bytes_read for one in hub.requests("PUT", "^/storage/")]
    assert sent == [100_000, SHARD_BYTES, SHARD_BYTES] and len(hub.repositories[REPO].messages) == 1


def test_push_that_broke_off_publishes_nothing_and_the_next_one_sends_only_the_rest(hub, push, waits):
    second = hub_oid(SHARDS[1])
    hub.faults = [Fault("PUT", second, 99, after_bytes=100_000)]
    with pytest.raises(ValueError) as caught:
        push()
    for words in (f"send {SHARDS[1]}", "after 3 tries. Nothing was published", "The folder is complete; the same line"):
        assert words in str(caught.value)
    assert published(hub) == set() and hub.repositories[REPO].messages == []
    hub.faults, hub.received = [], []
    push()
    assert [(one.path, one.bytes_read) for one in hub.requests("PUT", "^/storage/")] == [
        (f"/storage/{second}", SHARD_BYTES)
    ]
    assert set(SHARDS) <= published(hub) and len(hub.repositories[REPO].messages) == 1


def hub_oid(name: str) -> str:
    return hashlib.sha256(bytes([SHARDS.index(name)]) * SHARD_BYTES).hexdigest()


def test_push_that_is_asked_to_stop_ends_before_the_next_file(hub, push):
    def stop() -> None:
        if hub.objects:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        push(before_each=stop)
    assert hub.bytes_stored() == SHARD_BYTES and published(hub) == set()


def test_commit_whose_answer_is_lost_is_found_and_not_made_twice(hub, push, monkeypatch):
    read, hashed = lfs.sha_fileobj, []
    monkeypatch.setattr(lfs, "sha_fileobj", lambda file: (hashed.append(file.name), read(file))[1])
    hub.faults = [Fault("POST", "/commit/", after_answering=True)]
    address = push()
    assert len(hashed) == 2  # large files are read for their checksum once
    repository = hub.repositories[REPO]
    assert len(repository.messages) == 1 and address.endswith(repository.commits[-1])
    assert hub.bytes_stored() == 2 * SHARD_BYTES


def test_commit_of_somebody_else_meanwhile_is_looked_at_before_ours(hub, push):
    def commit_other_weights() -> None:
        repository = hub.repositories[REPO]
        repository.files["model.safetensors"] = "0"  # would be loaded instead of our two
        repository.commits.append("1" * 40)

    hub.faults = [Fault("POST", "/commit/", meanwhile=commit_other_weights)]
    push()
    assert published(hub) == {"README.md", "config.json", "1_Pooling/config.json", *SHARDS}
    assert len(hub.repositories[REPO].messages) == 1


def test_connection_without_a_word_counts_as_broken(hub, push, waits):
    hub.faults = [Fault("POST", "/commit/", silent=True)]
    began = time.monotonic()
    push()
    assert time.monotonic() - began < 40  # the stand-in would keep the connection for a minute
    assert waits == [7.0] and len(hub.repositories[REPO].messages) == 1


def test_hub_that_cannot_be_reached_is_told_with_the_way_out(hub, push, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match="ConnectError.*after 3 tries.*type it with cluster=local on a machine"):
        push()


@pytest.mark.parametrize("login", ["none", "unknown"])
def test_push_without_a_valid_token_says_what_to_type_at_once(hub, push, waits, monkeypatch, login):
    monkeypatch.setenv("HF_TOKEN", TOKEN[::-1]) if login == "unknown" else monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError) as caught:
        push()
    message = str(caught.value)
    assert "Type: hf auth login (or set HF_TOKEN), with a token that may write to lab" in message
    assert "Nothing was published" in message and TOKEN[::-1] not in message
    assert ("no token" in message) == (login == "none")
    assert waits == [] and hub.repositories == {}


def test_token_of_the_hubs_own_login_serves(hub, push, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "login").write_text(TOKEN)
    assert push().startswith(hub.url) and {one.token for one in hub.requests("POST", "/commit/")} == {TOKEN}


def test_token_that_may_not_write_is_told_without_the_token(hub, push, waits):
    hub.tokens[TOKEN] = "read"  # the stand-in has the token in its answer
    with pytest.raises(ValueError) as caught:
        push()
    message = str(caught.value)
    assert "answer 403: Forbidden: the token <hidden> must have write permission" in message
    assert "hf auth whoami" in message and f"{hub.url}/settings/tokens" in message and TOKEN not in message
    assert caught.value.__cause__ is None and caught.value.__context__ is None
    assert waits == [] and hub.repositories == {}


def test_public_repository_gets_nothing_that_is_to_be_private(hub, push):
    push(private=False)
    hub.received.clear()
    with pytest.raises(ValueError, match="already and public.*hf repos settings lab/model --private"):
        push(private=True)
    assert hub.bytes_stored() == 0 and hub.requests("POST", "/preupload/|/commit/") == []


def test_file_that_the_repository_ignores_is_not_left_out_silently(hub, push):
    hub.ignored = ("config.json",)
    with pytest.raises(ValueError, match=r"\.gitignore of lab/model leaves out config.json. Nothing was published"):
        push()
    assert published(hub) == set()


def test_file_with_the_token_is_not_published(hub, push, folder):
    (folder / "training_config.yaml").write_text(f"cluster:\n  setup: [export HF_TOKEN={TOKEN}]\n")
    with pytest.raises(ValueError, match="training_config.yaml holds the token.*cluster.setup") as caught:
        push()
    assert TOKEN not in str(caught.value) and hub.received == []


@pytest.mark.parametrize(
    "name", ["model", "a/b/c", "lab/a..b", "lab/a--b", "-lab/model", "lab/model.git", "lab/mo del", ""]
)
def test_malformed_name_is_refused_before_anything_is_asked(hub, folder, name):
    with pytest.raises(ValueError, match="export.push=organisation/name"):
        push_folder(folder, name, private=True, message="m")
    check_repo_id("lab-1/Model_2.0")
    assert hub.received == []


def test_empty_folder_is_refused(hub, tmp_path):
    with pytest.raises(ValueError, match="no files to push. Make it first: stage=export"):
        push_folder(tmp_path / "nothing", REPO, private=True, message="m")


def test_secrets_of_every_kind_are_scrubbed(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "an-odd-token")
    assert scrub("with an-odd-token in it") == "with <hidden> in it"
    assert scrub("hf_0123456789abcdefghij and hf_xet") == "<hidden> and hf_xet"
    assert scrub("Authorization: Bearer abc.def") == "Authorization: Bearer <hidden>"
    assert scrub("PUT https://s3.host/a/b?X-Amz-Signature=12&x=3 failed") == "PUT https://s3.host/a/b?<hidden> failed"
    assert scrub("git clone https://me:secret@host/a") == "git clone https://<hidden>@host/a"
    assert scrub("token=eyJhbGciOi.eyJzdWIi.c2ln") == "token=<hidden>"


_PUSHES = """
import logging, sys
logging.basicConfig(level=logging.DEBUG, stream=sys.stdout)
from pathlib import Path
from tdro_hpc.report import hub
hub._ALONE_BYTES = 300_000
for number in range(int(sys.argv[2])):
    try:
        print("address", hub.push_folder(Path(sys.argv[1]), "lab/model", private=True, message="m",
                                         patience=hub.Patience(tries=2, sleep=lambda seconds: None)), flush=True)
    except ValueError as error:
        logging.exception("failed: %s", error)
"""


def push_in_a_process(hub: Hub, folder: Path, home: Path, *, times: int, xet: bool) -> str:
    """Everything that `times` pushes print when all loggers are as loud as they can be."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": TOKEN, "HF_DEBUG": "1"}
    environment |= {"HF_HUB_DISABLE_XET": str(int(not xet)), "HF_XET_CLIENT_RETRY_BASE_DELAY": "5ms"}
    done = subprocess.run(
        [sys.executable, "-c", _PUSHES, str(folder), str(times)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def files_with(secret: str, folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


def test_xet_goes_on_with_the_rest_publishes_whole_and_keeps_the_token(folder, tmp_path):
    home = tmp_path / "home"
    with running_hub() as hub:
        hub.tokens[TOKEN] = "write"
        hub.faults = [Fault("POST", "/xorbs/", 99, spare=1, after_bytes=1000)]
        said = push_in_a_process(hub, folder, home, times=1, xet=True)
        assert f"failed to send {SHARDS[1]}" in said and "Nothing was published" in said and published(hub) == set()
        hub.faults = [Fault("POST", "/xorbs/", 1, status=503), Fault("POST", "/commit/", 2, status=500)]
        already = set(hub.xorbs)
        said += push_in_a_process(hub, folder, home, times=3, xet=True)
    assert len(already) == 1 and len(hub.xorbs) == 2
    assert len([one for one in hub.requests("POST", "/xorbs/") if one.path.endswith(tuple(already))]) == 1
    assert "failed to commit (answer 500) after 2 tries" in said and "has these files already" in said
    assert len(hub.repositories[REPO].messages) == 1 and set(SHARDS) <= published(hub)
    assert hub.requests("PUT", "") == []
    for secret in (TOKEN, STORAGE_KEY):
        assert secret not in said and files_with(secret, tmp_path) == []


@pytest.mark.parametrize("xet", [False, True])
def test_no_word_or_file_of_a_failing_push_holds_the_token(folder, tmp_path, xet):
    with running_hub() as hub:
        hub.tokens[TOKEN] = "write"
        path = "xet-write-token" if xet else "/storage/"
        echo = {"status": 403, "body": f'{{"error": "no {TOKEN}, Bearer {TOKEN}"}}'}
        hub.faults = [Fault("GET" if xet else "PUT", path, 1, **echo), Fault("POST", "/repos/create", 0, **echo)]
        said = push_in_a_process(hub, folder, tmp_path / "home", times=1, xet=xet)
        hub.faults[1].times = 9
        hub.repositories.clear()
        said += push_in_a_process(hub, folder, tmp_path / "home", times=1, xet=xet)
    assert len(re.findall("failed:", said)) == 2 and said.count("hf auth login") >= 2
    for secret in (TOKEN, STORAGE_KEY):
        assert secret not in said and files_with(secret, tmp_path) == []


def test_scripts_of_jobs_do_not_hold_the_token(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    config = load_config(["cluster=slurm", "name=demo"], configs_dirs=[ROOT / "configs"]).config
    for name, stage in stage_graph(config).items():
        text = sbatch_script(config, stage, tmp_path / name, ranks=1, code=None)
        assert "srun" in text and TOKEN not in text and "HF_TOKEN" not in text and "--export" not in text
