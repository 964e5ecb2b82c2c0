"""Programs that the front door starts: short ones whose words it wants, and long ones that outlive its terminal."""

import subprocess
from pathlib import Path


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
