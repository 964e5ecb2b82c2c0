"""Signals set a flag; what a rank has started lives on when Slurm tells every process of the step."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

from tdro_hpc.training.stop import StopFlag

ROOT = Path(__file__).parents[2]
# A rank as run.py makes it, with a thread from before, and children by exec and by fork.
RANK = """
    import os, signal, subprocess, sys, threading, time
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()  # as numpy's, from before the mask
    from tdro_hpc.run import _note_signals
    early = _note_signals()
    child = subprocess.Popen(["sleep", "60"])
    from tdro_hpc.training.stop import install_stop_handlers
    flag = install_stop_handlers()
    forked = os.fork()
    if forked == 0:
        time.sleep(60)
        os._exit(0)
    print("ready", flag.requested, flush=True)
    sys.stdin.readline()
    for number in early:
        flag.request(number)
    print(flag.requested, flag.reason, child.poll(), os.waitpid(forked, os.WNOHANG)[0], flush=True)
    sys.stdin.readline()
    print(child.wait(10), flush=True)
"""


def test_signal_to_the_whole_group_stops_the_rank_and_spares_its_children():
    rank = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(RANK)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert rank.stdin and rank.stdout
    try:
        assert rank.stdout.readline() == "ready False\n"
        os.killpg(rank.pid, signal.SIGUSR2)
        time.sleep(0.3)
        rank.stdin.write("\n")
        rank.stdin.flush()
        assert rank.stdout.readline() == "True SIGUSR2 None 0\n"
        # SIGTERM keeps its meaning for other programs: a cancelled job leaves nothing behind.
        os.killpg(rank.pid, signal.SIGTERM)
        rank.stdin.write("\n")
        rank.stdin.flush()
        assert rank.stdout.readline() == "-15\n"
    finally:
        os.killpg(rank.pid, signal.SIGKILL)
        rank.wait()
        rank.stdin.close()
        rank.stdout.close()


def test_pending_signal_counts_as_a_request():
    flag = StopFlag()
    assert not flag.requested
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    try:
        # To this thread: others of this process, such as torch's, may not block it.
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR2)
        assert flag.requested and flag.reason == "SIGUSR2"
        flag.request(signal.SIGTERM)
        assert flag.reason == "SIGTERM"
    finally:
        signal.sigwait({signal.SIGUSR2})
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
