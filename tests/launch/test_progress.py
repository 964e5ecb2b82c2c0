import contextlib
import io
import json
import os
import pty

from tdro_hpc.launch.jobs import newest_metrics
from tdro_hpc.launch.look.progress import LogTail, view_for


def test_tail_gives_new_whole_lines_only(tmp_path):
    path = tmp_path / "log"
    path.write_text("old\n")
    tail = LogTail(path)
    assert tail.read() == ""
    with open(path, "a") as file:
        file.write("one\ntwo\nthr")
    assert tail.read() == "one\ntwo\n"
    with open(path, "a") as file:
        file.write("ee\n")
    assert tail.read() == "three\n"


def test_tail_waits_for_the_file(tmp_path):
    tail = LogTail(tmp_path / "log")
    assert tail.read() == ""
    (tmp_path / "log").write_text("first\n")
    assert tail.read() == "first\n"


def test_newest_row_is_read_from_the_end_of_a_long_file(tmp_path):
    assert newest_metrics(tmp_path) == {}
    rows = [json.dumps({"step": step, "padding": "x" * 3000}) for step in range(100)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows) + '\n{"step": 100, "pad')
    assert newest_metrics(tmp_path)["step"] == 99
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}')
    assert newest_metrics(tmp_path) == {}


def test_lines_pass_through_to_a_file(tmp_path):
    out = io.StringIO()
    (tmp_path / "log").mkdir()
    with view_for(out) as view:
        view.begin(tmp_path, "s0")
        (tmp_path / "log" / "rank0.log").write_text("s0 step 1/2\n")
        view.update()
        view.say("words")
        view.end()
    assert out.getvalue() == "s0 step 1/2\nwords\n"


def text_of(terminal: int) -> str:
    """All that was written to a terminal whose other end is closed."""
    parts = []
    with contextlib.suppress(OSError):  # EIO is the end
        while part := os.read(terminal, 1 << 16):
            parts.append(part)
    os.close(terminal)
    return b"".join(parts).decode()


def test_a_terminal_gets_a_bar_with_the_newest_line(tmp_path):
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "rank0.log").write_text("older\nloss [bold]1.5\n")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "steps": 2}\n')
    reader, writer = pty.openpty()
    with os.fdopen(writer, "w") as out:
        with view_for(out) as view:
            view.begin(tmp_path, "s0")
            view.update()
            view.say("[not markup]")
            view.end()
    shown = text_of(reader)
    assert "s0" in shown and "loss [bold]1.5" in shown and "[not markup]" in shown
