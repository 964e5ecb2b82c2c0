import os
import signal
import threading
import time

import pytest

from tdro_hpc.launch.commands import Outcome, run_command


def test_outcome_has_the_code_and_both_kinds_of_words():
    assert run_command(["sh", "-c", "echo out; echo err >&2; exit 5"]) == Outcome(5, "out\n", "err\n")


def test_bytes_that_are_no_text_do_not_matter():
    assert run_command(["printf", r"a\377b"]).out == "a\ufffdb"


def test_a_program_that_is_not_there_is_127_in_words(tmp_path):
    assert run_command(["tdro-no-such-program"]) == Outcome(127, "", "tdro-no-such-program is not installed here")
    (tmp_path / "x").write_text("")
    answer = run_command([str(tmp_path / "x")])
    assert answer.code == 127 and "cannot be started" in answer.err


def test_a_program_that_takes_too_long_is_124_in_words():
    began = time.monotonic()
    assert run_command(["sleep", "20"], seconds=0.2) == Outcome(124, "", "sleep did not answer within 0.2 s")
    assert time.monotonic() - began < 5


def test_a_program_reads_nothing_from_the_terminal():
    assert run_command(["cat"], seconds=5) == Outcome(0, "", "")


def test_ctrl_c_ends_the_program_and_is_passed_on(tmp_path):
    timer = threading.Timer(0.4, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        run_command(["sh", "-c", f"sleep 2; touch {tmp_path}/lived"], seconds=10)
    timer.join()
    time.sleep(2)
    assert not (tmp_path / "lived").exists()
