import gzip

from tdro_hpc.evaluation import runs
from tdro_hpc.evaluation.runs import write_run

RUN = {"q 1": [("d1", 0.123456789), ("d\t2", 0.12345678)], "q2": []}


def test_lines_have_the_six_columns_of_trec(tmp_path):
    path = write_run(tmp_path / "m" / "set.trec", RUN, model="my model")
    assert path == tmp_path / "m" / "set.trec"
    assert path.read_text().splitlines() == ["q_1 Q0 d1 1 0.123456789 my_model", "q_1 Q0 d_2 2 0.12345678 my_model"]


def test_a_long_run_is_packed_and_takes_the_place_of_a_plain_one(tmp_path, monkeypatch):
    plain = write_run(tmp_path / "set.trec", RUN, model="m")
    monkeypatch.setattr(runs, "LINES_OF_A_PLAIN_FILE", 1)
    packed = write_run(tmp_path / "set.trec", RUN, model="m")
    assert packed.name == "set.trec.gz" and not plain.exists()
    assert gzip.decompress(packed.read_bytes()).decode().count("\n") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["set.trec.gz"]
