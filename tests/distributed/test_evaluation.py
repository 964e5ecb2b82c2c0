"""1 = 2 ranks for stage eval, and a stop that only one rank hears of."""

import json

from tests.distributed.evaluation_run import NUM_DOCUMENTS, write_set
from tests.distributed.launching import run_ranks


def test_two_ranks_give_the_files_of_one_also_after_a_stop_of_one_rank(tmp_path):
    folders = {}
    for world in (1, 2):
        folders[world] = tmp_path / str(world)
        write_set(folders[world] / "sets" / "numbers")
        (folders[world] / "run" / "eval").mkdir(parents=True)
    run_ranks("evaluation_run.py", folders[1], 1, [])
    run_ranks("evaluation_run.py", folders[2], 2, ["stop"])
    for rank in (0, 1):
        assert "eval stopped at step" in (folders[2] / f"rank-{rank}.txt").read_text()
    notes = sorted((folders[2] / "run/embeddings/base/numbers/documents").glob("part-*.json"))
    done = [json.loads(note.read_text())["rows_done"] for note in notes]
    assert len(done) == 3 and 0 < done[1] < 256 and done[0] + done[2] == NUM_DOCUMENTS - 256
    run_ranks("evaluation_run.py", folders[2], 2, [])
    for name in ("scores/scores.json", "table.txt", "scores/runs/base/numbers.trec", "scores/runs/bm25/numbers.trec"):
        one, two = (folders[world] / "run/eval/out" / name for world in (1, 2))
        assert one.read_bytes() == two.read_bytes(), name
