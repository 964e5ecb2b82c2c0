import hashlib
import json

import numpy as np
import pytest
import torch

from tdro_hpc.data.tokens import Tokens, with_instruction
from tdro_hpc.parallel.process import Process
from tdro_hpc.retrieval import encode
from tdro_hpc.retrieval.encode import EncodingRun, Side, TextModel, encode_texts, model_fingerprint, rows_done
from tdro_hpc.retrieval.progress import Progress
from tdro_hpc.training.metrics import read_rows
from tdro_hpc.training.stop import StopFlag, Stopped

WIDTH = 6
QUERIES = Side("queries", "", 16)


class WordTokenizer:
    """A token a word, padding on the left or right."""

    def __init__(self, left=False):
        self.left = left

    def encode(self, texts, *, max_tokens):
        rows = [[1 + len(word) for word in text.split()][:max_tokens] or [1] for text in texts]
        width = max(map(len, rows))
        ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
        for row, values in enumerate(rows):
            place = slice(width - len(values), width) if self.left else slice(0, len(values))
            ids[row, place], mask[row, place] = torch.tensor(values), 1
        return Tokens(ids, mask)


class Model:
    """Vectors that depend on the real tokens only; counts what it is asked for."""

    def __init__(self):
        self.batches = []

    def __call__(self, tokens):
        self.batches.append(tuple(tokens.input_ids.shape))
        ids, mask = tokens.input_ids.double(), tokens.attention_mask.double()
        powers = torch.stack([((ids * mask) ** power).sum(1) for power in range(1, WIDTH)] + [mask.sum(1)], 1)
        return torch.nn.functional.normalize(powers, dim=1).float()

    @property
    def rows(self):
        return sum(rows for rows, _ in self.batches)


class ListOfTexts:
    def __init__(self, texts):
        self.texts = texts
        self.lengths = np.array([len(text) for text in texts])
        self.fingerprint = hashlib.sha1("\0".join(texts).encode()).hexdigest()

    def text(self, row):
        return self.texts[row]


@pytest.fixture
def texts():
    draws = np.random.default_rng(0)
    return ListOfTexts([" ".join("w" * draws.integers(1, 9) for _ in range(draws.integers(0, 30))) for _ in range(700)])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(encode, "_BATCHES_A_BLOCK", 2)


def text_model(embed, left=False, **identity):
    return TextModel(embed, WordTokenizer(left), WIDTH, {"model": "m", **identity})


def run_of(tmp_path, *, stop=None, rank=0, size=1, batch_tokens=256, lines=None, seconds=1e9):
    say = (lines if lines is not None else []).append
    progress = Progress(
        tmp_path / "metrics.jsonl", stage="eval", rows=700, first_rank=rank == 0, seconds=seconds, say=say
    )
    process = Process(rank, size, rank, torch.device("cpu"))
    return EncodingRun("eval", batch_tokens, process, stop or StopFlag(), progress)


def expected(texts, side=QUERIES):
    tokens = [
        WordTokenizer().encode([with_instruction(text, side.instruction)], max_tokens=side.max_tokens)
        for text in texts.texts
    ]
    return np.concatenate([Model()(one).numpy() for one in tokens])


@pytest.mark.parametrize("left", [False, True])
def test_every_text_has_its_vector_and_batches_keep_the_budget(tmp_path, texts, left):
    model, side = Model(), Side("documents", "Find it", 16)
    vectors = encode_texts(texts, text_model(model, left), tmp_path / "d", side, run_of(tmp_path))
    np.testing.assert_allclose(vectors.rows(np.arange(700)), expected(texts, side), atol=1e-6)
    assert max(rows * tokens for rows, tokens in model.batches) <= 256
    # Sorted by length there is little padding: all batches together hold few more tokens than the texts.
    real = WordTokenizer().encode([with_instruction(t, "Find it") for t in texts.texts], max_tokens=16)
    assert sum(rows * tokens for rows, tokens in model.batches) < 1.15 * int(real.attention_mask.sum())


def test_finished_vectors_are_not_encoded_again(tmp_path, texts):
    first = encode_texts(texts, text_model(Model()), tmp_path / "q", QUERIES, run_of(tmp_path))
    model, lines = Model(), []
    again = encode_texts(texts, text_model(model), tmp_path / "q", QUERIES, run_of(tmp_path, lines=lines))
    assert model.rows == 0 and not [line for line in lines if "again" in line]
    np.testing.assert_array_equal(first.rows(np.arange(700)), again.rows(np.arange(700)))


@pytest.mark.parametrize(
    "change, named",
    [
        ({"model": "other"}, "model was 'm', is 'other'"),
        ({"side": Side("queries", "Find", 16)}, "instruction was '', is 'Find'"),
        ({"side": Side("queries", "", 8)}, "max_tokens was 16, is 8"),
        ({"texts": "more"}, "texts was"),
    ],
)
def test_vectors_of_something_else_are_made_again_and_the_difference_is_named(tmp_path, texts, change, named):
    encode_texts(texts, text_model(Model()), tmp_path / "q", QUERIES, run_of(tmp_path))
    model, lines = Model(), []
    now = ListOfTexts([change["texts"]] + texts.texts[1:]) if "texts" in change else texts
    identity = {"model": change["model"]} if "model" in change else {}
    side = change.get("side", QUERIES)
    vectors = encode_texts(now, text_model(model, **identity), tmp_path / "q", side, run_of(tmp_path, lines=lines))
    assert model.rows == 700 and named in "".join(lines)
    np.testing.assert_allclose(vectors.rows(np.arange(700)), expected(now, side), atol=1e-6)


def test_a_stopped_encoding_goes_on_where_it_was_and_gives_the_same_bits(tmp_path, texts):
    whole = encode_texts(texts, text_model(Model()), tmp_path / "whole", QUERIES, run_of(tmp_path))
    flag = StopFlag()

    class Stopping(Model):
        def __call__(self, tokens):
            if len(self.batches) == 3:
                flag.request(15)
            return super().__call__(tokens)

    with pytest.raises(Stopped, match="of 700 .SIGTERM.; the same line continues"):
        encode_texts(texts, text_model(Stopping()), tmp_path / "q", QUERIES, run_of(tmp_path, stop=flag))
    done = rows_done(tmp_path / "q")
    assert 0 < done < 700
    model = Model()
    resumed = encode_texts(texts, text_model(model), tmp_path / "q", QUERIES, run_of(tmp_path))
    assert model.rows == 700 - done
    np.testing.assert_array_equal(whole.rows(np.arange(700)), resumed.rows(np.arange(700)))


def test_a_part_whose_vectors_vanished_is_encoded_again_from_its_start(tmp_path, texts):
    encode_texts(texts, text_model(Model()), tmp_path / "q", QUERIES, run_of(tmp_path))
    (tmp_path / "q" / "part-00001.npy").unlink()
    model = Model()
    vectors = encode_texts(texts, text_model(model), tmp_path / "q", QUERIES, run_of(tmp_path))
    assert model.rows == 256
    np.testing.assert_allclose(vectors.rows(np.arange(700)), expected(texts), atol=1e-6)


def test_parts_fall_to_ranks_by_turns_and_their_bits_do_not_depend_on_the_number_of_ranks(tmp_path, texts, monkeypatch):
    alone = encode_texts(texts, text_model(Model()), tmp_path / "one", QUERIES, run_of(tmp_path))
    folder, models = tmp_path / "two", [Model(), Model()]
    monkeypatch.setattr(encode, "Embeddings", lambda parts, order: None)
    monkeypatch.setattr(encode.np, "load", lambda *names, **options: None)  # the other rank's parts are not there yet
    for rank in (0, 1):
        encode_texts(texts, text_model(models[rank]), folder, QUERIES, run_of(tmp_path, rank=rank, size=2))
    monkeypatch.undo()
    assert [model.rows for model in models] == [256 + 188, 256]
    both = encode_texts(texts, text_model(Model()), folder, QUERIES, run_of(tmp_path))
    np.testing.assert_array_equal(alone.rows(np.arange(700)), both.rows(np.arange(700)))


def test_a_vector_that_is_not_finite_names_its_text(tmp_path, texts):
    class Broken(Model):
        def __call__(self, tokens):
            vectors = super().__call__(tokens)
            vectors[0, 0] = float("nan")
            return vectors

    with pytest.raises(ValueError, match=r"vector of row \d+ of the queries has NaN"):
        encode_texts(texts, text_model(Broken()), tmp_path / "q", QUERIES, run_of(tmp_path))


def test_progress_is_a_line_and_a_row_of_metrics(tmp_path, texts):
    lines = []
    encode_texts(texts, text_model(Model()), tmp_path / "q", QUERIES, run_of(tmp_path, lines=lines, seconds=0))
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert rows[-1]["step"] == rows[-1]["steps"] == 700 and rows[0]["step"] < 700
    assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)
    assert lines[-1].startswith("eval rows 700/700 100%")


def test_fingerprint_sees_a_changed_weight_and_a_changed_tokenizer():
    layer = torch.nn.Linear(3, 2).to(torch.bfloat16)
    before = model_fingerprint(layer, WordTokenizer())
    assert model_fingerprint(layer, WordTokenizer()) == before

    class LongerTokenizer(WordTokenizer):
        def encode(self, texts, *, max_tokens):
            return super().encode([text + " end" for text in texts], max_tokens=max_tokens)

    assert model_fingerprint(layer, LongerTokenizer()) != before
    with torch.no_grad():
        layer.weight[0, 0] += 1
    assert model_fingerprint(layer, WordTokenizer()) != before


def test_manifest_is_plain_json_with_what_the_vectors_were_made_from(tmp_path, texts):
    encode_texts(texts, text_model(Model(), pooling="mean"), tmp_path / "q", QUERIES, run_of(tmp_path))
    manifest = json.loads((tmp_path / "q" / "manifest.json").read_text())
    assert {"model", "pooling", "side", "instruction", "max_tokens", "texts", "rows", "width"} <= manifest.keys()
