import numpy as np
import pytest

from tdro_hpc.data import keyedfile, rowfile
from tdro_hpc.data.keyedfile import KeyedFile, json_id


@pytest.mark.parametrize("block_bytes", [7, 64, 1 << 20])
def test_lines_of_a_key_are_those_a_plain_search_finds(tmp_path, write_lines, monkeypatch, block_bytes):
    monkeypatch.setattr(rowfile, "BLOCK_BYTES", block_bytes)
    random = np.random.default_rng(0)
    lines = [f"k{random.integers(20)}\tvalue {number}" for number in range(300)]
    file = KeyedFile(write_lines(tmp_path / "x.tsv", lines), cache_dir="", key="first_field")
    keys = [f"k{number}" for number in range(25)]
    expected = [[line for line in lines if line.split("\t")[0] == key] for key in keys]
    assert [[line.decode() for line in found] for found in file.lines(keys)] == expected


def test_neighbouring_lines_of_a_key_are_one_stretch(tmp_path, write_lines):
    file = KeyedFile(write_lines(tmp_path / "x.tsv", ["a\t1", "a\t2", "b\t3", "a\t4"]), cache_dir="", key="first_field")
    assert file.places_in_order.tolist() == [[0, 7], [8, 11], [12, 15]]


def test_keys_with_the_same_hash_are_told_apart(tmp_path, write_lines, monkeypatch):
    monkeypatch.setattr(keyedfile, "hash_of", lambda key: 1)
    file = KeyedFile(write_lines(tmp_path / "x.tsv", ["a\t1", "b\t2", "a\t3"]), cache_dir="", key="first_field")
    assert file.lines(["b", "a", "c"]) == [[b"b\t2"], [b"a\t1", b"a\t3"], []]


@pytest.mark.parametrize(
    "line", [b'{"_id": "a b", "text": "x"}', b'{"text": "x", "_id": "a b"}', b'{"_id":"a\\u0020b"}']
)
def test_id_of_a_json_line_is_found_wherever_it_stands(line):
    assert json_id(line) == "a b"


def test_line_without_an_id_is_named(tmp_path, write_lines):
    path = write_lines(tmp_path / "corpus.jsonl", [{"_id": "1", "text": "x"}, {"text": "y"}])
    with pytest.raises(ValueError, match=r"corpus.jsonl, line 2: the line has no id"):
        KeyedFile(path, cache_dir="", key="json_id")
