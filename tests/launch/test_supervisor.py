"""The supervisor over ranks that are shell commands: who is ended when, and what is written down."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]


def supervise(tmp_path: Path, script: str, ranks: int = 2) -> "subprocess.Popen[bytes]":
    """A supervisor in a session of its own; `script` sees its rank as $SUBMITIT_LOCAL_GLOBALID."""
    folder = tmp_path / "s0" / "log" / "attempt-1"
    folder.mkdir(parents=True)
    command = f"sh -c '{script}'"
    environment = {
        **os.environ,
        "SUBMITIT_LOCAL_NTASKS": str(ranks),
        "SUBMITIT_LOCAL_COMMAND": command,
        "SUBMITIT_LOCAL_TIMEOUT_S": "1",  # submitit's own limit, which does not hold here
        "SUBMITIT_LOCAL_SIGNAL_DELAY_S": "0",
        "SUBMITIT_STDERR_TO_STDOUT": "",
        "SUBMITIT_LOCAL_WITH_SHELL": "",
    }
    command_line = [sys.executable, "-m", "tdro_hpc.launch.local.supervisor", str(folder)]
    return subprocess.Popen(command_line, cwd=ROOT, env=environment, start_new_session=True)


def left_in_group(group: int) -> list[int]:
    found = []
    for process in psutil.process_iter(["pid", "status"]):
        try:
            ours = os.getpgid(process.pid) == group
        except ProcessLookupError:
            continue
        if ours and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process.pid)
    return found


def started(tmp_path: Path, process: "subprocess.Popen[bytes]", ranks: int = 2) -> None:
    """Return when every rank has made its file."""
    deadline = time.monotonic() + 30
    while len(list(tmp_path.glob("up-*"))) < ranks:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)


def exit_codes(tmp_path: Path) -> list[int]:
    return json.loads((tmp_path / "s0" / "jobs.jsonl").read_text())["exit_codes"]


def failed(tmp_path: Path) -> dict | None:
    path = tmp_path / "s0" / "FAILED.json"
    return json.loads(path.read_text()) if path.exists() else None


def test_ranks_that_end_well_leave_nothing_but_their_codes(tmp_path):
    process = supervise(tmp_path, "sleep 2")  # longer than submitit's limit
    assert process.wait(30) == 0
    assert exit_codes(tmp_path) == [0, 0] and failed(tmp_path) is None
    assert (tmp_path / "s0" / "log" / "alive").exists()


def test_a_rank_that_never_came_to_life_is_named_with_its_last_words(tmp_path):
    script = (
        'if [ "$SUBMITIT_LOCAL_GLOBALID" = 1 ]; then echo no such module >&2; exit 9; fi; trap "" TERM INT; sleep 60'
    )
    process = supervise(tmp_path, script)
    began = time.monotonic()
    assert process.wait(30) == 1 and time.monotonic() - began < 15
    assert exit_codes(tmp_path)[1] == 9 and exit_codes(tmp_path)[0] == -signal.SIGKILL
    found = failed(tmp_path)
    assert found is not None and found["rank"] == 1
    assert found["error"] == "left with exit code 9 before it could say why\nno such module"


def test_orphans_of_a_killed_rank_are_ended(tmp_path):
    # The child of the rank ignores every polite signal, as a loader process does.
    script = f'(trap "" TERM INT USR2; sleep 300) & touch {tmp_path}/up-$SUBMITIT_LOCAL_GLOBALID; wait'
    process = supervise(tmp_path, script)
    started(tmp_path, process)
    rank = psutil.Process(process.pid).children()[0]
    rank.kill()
    assert process.wait(30) == 1
    assert left_in_group(process.pid) == []
    found = failed(tmp_path)
    assert found is not None and "ended by SIGKILL" in found["error"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_stop_signals_reach_every_rank(tmp_path, number):
    name = number.name.removeprefix("SIG")
    script = (
        f'trap "sleep 0.3; exit 0" {name}; touch {tmp_path}/up-$SUBMITIT_LOCAL_GLOBALID; while :; do sleep 0.05; done'
    )
    process = supervise(tmp_path, script)
    started(tmp_path, process)
    process.send_signal(number)
    assert process.wait(30) == 0
    assert exit_codes(tmp_path) == [0, 0] and failed(tmp_path) is None


def test_a_stop_before_a_rank_can_listen_is_no_failure(tmp_path):
    process = supervise(tmp_path, f"touch {tmp_path}/up-$SUBMITIT_LOCAL_GLOBALID; exec sleep 60")
    started(tmp_path, process)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    assert exit_codes(tmp_path) == [-15, -15] and failed(tmp_path) is None


def test_hangup_of_the_terminal_is_ignored(tmp_path):
    process = supervise(tmp_path, f"touch {tmp_path}/up-$SUBMITIT_LOCAL_GLOBALID; exec sleep 1")
    started(tmp_path, process)
    process.send_signal(signal.SIGHUP)
    assert process.wait(30) == 0 and exit_codes(tmp_path) == [0, 0]
