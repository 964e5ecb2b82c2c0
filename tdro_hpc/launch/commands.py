"""Programs that the front door starts: short ones whose words it wants, and long ones that outlive its terminal."""

import contextlib
import os
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

NOT_INSTALLED, TOO_LATE = 127, 124  # exit codes of a command that is not there, and of one that was ended for its time


@dataclass(frozen=True)
class Outcome:
    """How a short command ended."""

    code: int  # 0 = well; 127 = it is not installed, 124 = it took too long
    out: str
    err: str  # what it said itself, or our words where it could not


def run_command(command: list[str], *, seconds: float = 30.0) -> Outcome:
    """Run a short command to its end; one that takes longer than `seconds` is ended with all that it started.

    It has a session of its own: a Ctrl-C in the terminal must not hit sbatch between its submission and its words.
    """
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except FileNotFoundError:
        return Outcome(NOT_INSTALLED, "", f"{command[0]} is not installed here")
    except OSError as error:
        return Outcome(NOT_INSTALLED, "", f"{command[0]} cannot be started: {error}")
    with process:
        try:
            out, err = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            _end_session(process)
            return Outcome(TOO_LATE, "", f"{command[0]} did not answer within {seconds:g} s")
        except BaseException:
            _end_session(process)
            raise
    return Outcome(process.returncode, out, err)


def _end_session(process: "subprocess.Popen[str]") -> None:
    # A wrapper around the real program would leave that behind, if it alone were ended.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def output_of(command: list[str], *, folder: Path) -> str | None:
    """Standard output of a short command run in `folder`, stripped; None when it fails or is not installed."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def start_detached(command: list[str], *, environment: dict[str, str], log: Path) -> "subprocess.Popen[bytes]":
    """Start a program in a session of its own, with `environment` added to ours and its words appended to `log`.

    A Ctrl-C in the terminal goes to the whole foreground process group. A job must not get it beside the front door,
    which asks the job to stop in order.
    """
    # env(1) adds the variables and then becomes the command: the process id is that of the command.
    assignments = [f"{name}={value}" for name, value in environment.items()]
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as file:
        return subprocess.Popen(
            ["env", *assignments, *command],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
