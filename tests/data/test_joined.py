"""BEIR and MS MARCO folders."""

import gzip
import pickle
import shutil

import pytest

from tdro_hpc.config.schema import TaskConfig
from tdro_hpc.data.tasks import Task


def opened(path, form, on_bad_row="raise"):
    return Task("toy", TaskConfig(format=form), path, cache_dir="", on_bad_row=on_bad_row)


def content(record):
    return record.query_id, record.query, [(c.id, c.full_text, c.label) for c in record.candidates]


@pytest.fixture
def msmarco_folder(tmp_path, write_lines):
    folder = tmp_path / "marco"
    write_lines(folder / "collection.tsv", [f"{n}\tpassage {n}" for n in range(300)])
    write_lines(folder / "queries.train.tsv", ["7\tseven", "8\teight"])
    write_lines(folder / "qrels.train.tsv", ["7\t0\t250\t1", "8 0 6 1"])
    return folder


def test_beir_row_joins_texts_and_judgements_positives_first(beir_folder):
    task = opened(beir_folder, "beir")
    assert len(task) == 2  # c has no positive
    assert content(task.record(0)) == ("b", "query b", [("d3", "T3 text 3", 1), ("d4", "text 4", 1)])
    assert content(task.record(1)) == ("a", "query a", [("d0", "text 0", 1), ("d1", "T1 text 1", -1)])


def test_positives_come_first_whatever_the_order_of_the_judgements(beir_folder, write_lines):
    write_lines(beir_folder / "qrels" / "train.tsv", ["a\td1\t0", "a\td0\t1", "a\td2\t3"])
    record = opened(beir_folder, "beir").record(0)
    assert [(c.id, c.label) for c in record.candidates] == [("d0", 1), ("d2", 1), ("d1", -1)]


def test_packed_beir_folder_gives_the_same_rows(beir_folder):
    plain = [content(opened(beir_folder, "beir").record(row)) for row in range(2)]
    for name in ("corpus.jsonl", "queries.jsonl"):
        path = beir_folder / name
        path.with_name(f"{name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    shutil.rmtree(beir_folder / ".tdro_hpc")
    assert [content(opened(beir_folder, "beir").record(row)) for row in range(2)] == plain


def test_beir_run_adds_unjudged_negatives(beir_folder, write_lines):
    write_lines(beir_folder / "runs" / "train.trec", ["b Q0 d0 2 1.5 bm25", "b Q0 d3 1 9.0 bm25"])
    mined = opened(beir_folder, "beir").record(0).candidates[-1]
    assert (mined.id, mined.label, mined.source, mined.scores) == ("d0", 0, "train.trec", {"run": 1.5})


def test_training_split_is_read_and_another_can_be_named(beir_folder, write_lines):
    write_lines(beir_folder / "qrels" / "test.tsv", ["query-id\tcorpus-id\tscore", "c\td2\t1"])
    assert len(opened(beir_folder, "beir")) == 2
    assert opened(beir_folder / "qrels" / "test.tsv", "beir").record(0).query_id == "c"
    (beir_folder / "qrels" / "train.tsv").rename(beir_folder / "qrels" / "dev.tsv")
    with pytest.raises(ValueError, match="2 judgement files.*dev.tsv, qrels/test.tsv.*file: toy/qrels/dev.tsv"):
        opened(beir_folder, "beir")


def test_document_that_the_corpus_lacks_is_named_with_its_line(beir_folder, write_lines):
    write_lines(beir_folder / "qrels" / "train.tsv", ["a\td0\t1", "", "b\td9\t1"])
    task = opened(beir_folder, "beir")
    with pytest.raises(ValueError, match=r"train.tsv, line 3: document d9 of query b is not in .*corpus.jsonl"):
        task.record(1)
    skipping = opened(beir_folder, "beir", "skip")
    assert (len(skipping), skipping.skipped_rows) == (1, 1)
    assert skipping.record(0).query_id == "a"


@pytest.mark.parametrize("line", ["a\td0", "a\td0\tgood\t"])
def test_bad_judgement_is_named(beir_folder, write_lines, line):
    write_lines(beir_folder / "qrels" / "train.tsv", ["b\td0\t1", line])
    with pytest.raises(ValueError, match="train.tsv, near line 2: .*(columns|grade)"):
        opened(beir_folder, "beir")


@pytest.mark.parametrize(
    "run", [[f"7\t{n}\t{301 - n}" for n in range(300)], [f"7 Q0 {n} {301 - n} {n / 2} tag" for n in range(300)]]
)
def test_msmarco_run_gives_the_best_100_documents_that_are_not_judged(msmarco_folder, write_lines, run):
    write_lines(msmarco_folder / "run.train.tsv", run)
    record = opened(msmarco_folder, "msmarco").record(0)
    assert record.query == "seven" and [c.id for c in record.positives] == ["250"]
    assert [c.id for c in record.negatives] == [str(n) for n in range(299, 198, -1) if n != 250]
    assert record.negatives[0].full_text == "passage 299"


def test_msmarco_rows_survive_pickling(msmarco_folder):
    task = opened(msmarco_folder, "msmarco")
    assert pickle.loads(pickle.dumps(task)).record(1) == task.record(1)


def test_missing_part_of_a_folder_is_named(msmarco_folder):
    (msmarco_folder / "collection.tsv").unlink()
    with pytest.raises(ValueError, match=r"no collection.tsv and no collection.tsv.gz"):
        opened(msmarco_folder, "msmarco")
