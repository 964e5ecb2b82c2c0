import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch

from tdro_hpc.config.schema import DataConfig, TaskConfig, TrainingConfig
from tdro_hpc.data.batches import Batch, Batches
from tdro_hpc.data.draws import text_hash
from tdro_hpc.data.mixture import Mixture
from tdro_hpc.data.tasks import open_tasks
from tdro_hpc.data.tokens import Tokens
from tests.reference.batches import CharacterTokenizer, texts_of

ROWS = {"plain": 30, "both_sides": 20, "short": 12}


def row_of(task: str, row: int, *, positives: int = 2, negatives: int = 5) -> dict:
    def passages(kind: str, number: int) -> list[dict]:
        return [{"docid": "", "title": f"t{k}", "text": f"{task} {row} {kind} {k}"} for k in range(number)]

    return {
        "query_id": str(row),
        "query": f"{task} {row}",
        "positive_passages": passages("pos", positives),
        "negative_passages": passages("neg", negatives),
    }


def data_config(folder: Path, rows: dict[str, list[dict]], **tasks: TaskConfig) -> DataConfig:
    for name, of_task in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of_task))
    described = {name: tasks.get(name, TaskConfig()) for name in rows}
    return DataConfig(dir=str(folder), tasks=described, query_max_tokens=100, passage_max_tokens=100)


def usual_config(folder: Path) -> DataConfig:
    return data_config(
        folder,
        {name: [row_of(name, row) for row in range(size)] for name, size in ROWS.items()},
        plain=TaskConfig(instructions=["one", "two"]),
        both_sides=TaskConfig(instructions=["left", "right"], symmetric=True, negatives="group"),
        short=TaskConfig(query_max_tokens=5, passage_max_tokens=8),
    )


def build(config: DataConfig, *, rank=0, size=1, batching="mixed", rows=12, passages=3, negatives="batch") -> Batches:
    tasks = open_tasks(config)
    mixture = Mixture(
        [len(task) for task in tasks.values()],
        [1.0] * len(tasks),
        rows_per_micro_step=rows,
        micro_steps=2,
        batching=batching,
        stratified=False,
        seed=3,
    )
    training = TrainingConfig(passages_per_query=passages, batching=batching, negatives=negatives)
    return Batches(tasks, mixture, CharacterTokenizer(), config, training, data_rank=rank, data_size=size, seed=3)


def values_of(batch: Batch) -> list:
    """Everything in a batch, as lists; padding left out, since ranks pad to their own longest text."""
    return [
        texts_of(batch.query_tokens),
        texts_of(batch.passage_tokens),
        batch.task_ids.tolist(),
        batch.rows.tolist(),
        batch.document_ids.tolist(),
        [[known for known in row if known >= 0] for row in batch.known_positive_ids.tolist()],
        batch.own_negatives_only.tolist(),
        batch.draw_ids.tolist(),
    ]


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return usual_config(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def usual_batches(usual: DataConfig) -> list[Batch]:
    batches = build(usual)
    return [batches.batch(step, micro_step) for step in range(30) for micro_step in range(2)]


def rows_of(batches: list[Batch], task_id: int) -> list[tuple[Batch, int]]:
    return [(batch, i) for batch in batches for i, task in enumerate(batch.task_ids.tolist()) if task == task_id]


def test_shapes_and_types_are_those_of_the_contract(usual_batches: list[Batch]):
    batch = usual_batches[0]
    assert batch.query_tokens.input_ids.shape[0] == 12 and batch.passage_tokens.input_ids.shape[0] == 36
    for tensor, shape in [(batch.task_ids, 12), (batch.rows, 12), (batch.draw_ids, 12), (batch.document_ids, 36)]:
        assert tensor.dtype == torch.int64 and tensor.shape == (shape,)
    assert batch.own_negatives_only.dtype == torch.bool
    assert batch.known_positive_ids.shape == (12, 1)


def test_passages_are_one_own_positive_then_distinct_own_negatives(usual_batches: list[Batch]):
    for batch, i in rows_of(usual_batches, 0):
        row = int(batch.rows[i])
        positive, *negatives = texts_of(batch.passage_tokens)[3 * i : 3 * i + 3]
        assert positive in {f"t{k} plain {row} pos {k}" for k in range(2)}
        assert set(negatives) <= {f"t{k} plain {row} neg {k}" for k in range(5)} and len(set(negatives)) == 2


def test_each_positive_and_negative_is_drawn_equally_often(usual_batches: list[Batch]):
    drawn = rows_of(usual_batches, 0)
    texts = [text for batch, i in drawn for text in texts_of(batch.passage_tokens)[3 * i : 3 * i + 3]]
    kinds, rows = Counter(text.split(" ", 3)[3] for text in texts), len(drawn)
    assert abs(kinds["pos 0"] - rows / 2) < 4 * math.sqrt(rows / 4)
    assert all(abs(kinds[f"neg {k}"] - rows * 2 / 5) < 4 * math.sqrt(rows * 0.24) for k in range(5))


def test_a_row_draws_anew_in_its_next_epoch(usual_batches: list[Batch]):
    choices: dict[int, set] = {}
    for batch, i in rows_of(usual_batches, 0):
        choices.setdefault(int(batch.rows[i]), set()).add(tuple(texts_of(batch.passage_tokens)[3 * i : 3 * i + 3]))
    assert sum(len(drawn) > 1 for drawn in choices.values()) > 25


def test_instruction_is_drawn_a_use_and_on_both_sides_of_symmetric_tasks_only(usual_batches: list[Batch]):
    plain = rows_of(usual_batches, 0)
    queries = {texts_of(batch.query_tokens)[i].rsplit("plain", 1)[0] for batch, i in plain}
    assert queries == {"Instruct: one\nQuery: ", "Instruct: two\nQuery: "}
    assert not any("Instruct" in text for b, i in plain for text in texts_of(b.passage_tokens)[3 * i : 3 * i + 3])
    pairs: Counter[tuple[str, str]] = Counter()
    for batch, i in rows_of(usual_batches, 1):
        block = [text.split("\n")[0] for text in texts_of(batch.passage_tokens)[3 * i : 3 * i + 3]]
        assert len(set(block)) == 1
        pairs[texts_of(batch.query_tokens)[i].split("\n")[0], block[0]] += 1
    assert len(pairs) == 4 and min(pairs.values()) > 0.15 * sum(pairs.values())
    assert all("Instruct" not in texts_of(batch.query_tokens)[i] for batch, i in rows_of(usual_batches, 2))


def test_limits_of_a_task_replace_those_of_the_data(usual_batches: list[Batch]):
    for batch, i in rows_of(usual_batches, 2):
        assert texts_of(batch.query_tokens)[i] == "short"
        assert [len(text) for text in texts_of(batch.passage_tokens)[3 * i : 3 * i + 3]] == [8, 8, 8]
    assert any(len(text) > 8 for text in texts_of(usual_batches[0].passage_tokens))


def test_document_ids_hash_the_text_without_instruction_and_known_positives_are_the_others(usual_batches: list[Batch]):
    for batch, i in rows_of(usual_batches, 1):
        texts = [text.split("Query: ")[1] for text in texts_of(batch.passage_tokens)[3 * i : 3 * i + 3]]
        assert batch.document_ids[3 * i : 3 * i + 3].tolist() == [text_hash(text) for text in texts]
        row, chosen = int(batch.rows[i]), int(texts[0][-1])
        other = text_hash(f"t{1 - chosen} both_sides {row} pos {1 - chosen}")
        assert batch.known_positive_ids[i].tolist() == [other]


def test_own_negatives_only_marks_the_tasks_whose_policy_is_group(usual_batches: list[Batch]):
    for batch in usual_batches:
        assert torch.equal(batch.own_negatives_only, batch.task_ids == 1)


def test_draw_id_is_equal_exactly_when_row_passages_and_instructions_are(usual_batches: list[Batch]):
    seen: dict[int, tuple] = {}
    contents = set()
    for batch in usual_batches:
        queries, passages = texts_of(batch.query_tokens), texts_of(batch.passage_tokens)
        for i in range(12):
            prefix = queries[i].split("\n")[0] if "\n" in queries[i] else ""
            documents = tuple(batch.document_ids[3 * i : 3 * i + 3].tolist())
            content = (int(batch.task_ids[i]), int(batch.rows[i]), documents, prefix, passages[3 * i].split("\n")[0])
            assert seen.setdefault(int(batch.draw_ids[i]), content) == content
            contents.add(content)
    assert len(seen) == len(contents) and min(seen) >= 0


@pytest.mark.parametrize("batching", ["mixed", "homogeneous"])
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_put_together_are_the_batch_of_one_rank(usual: DataConfig, batching: str, size: int):
    whole = build(usual, batching=batching)
    ranks = [build(usual, rank=rank, size=size, batching=batching) for rank in range(size)]
    for step, micro_step in [(0, 0), (0, 1), (7, 1)]:
        wanted = whole.batch(step, micro_step)
        parts = [rank.batch(step, micro_step) for rank in ranks]
        together: list = [sum(columns, []) for columns in zip(*(values_of(part) for part in parts), strict=True)]
        assert together == values_of(wanted)
        counts = torch.bincount(wanted.task_ids, minlength=3)
        assert all(torch.equal(part.global_task_counts, counts) for part in parts)


def test_homogeneous_batch_has_the_same_task_on_all_ranks(usual: DataConfig):
    ranks = [build(usual, rank=rank, size=4, batching="homogeneous") for rank in range(4)]
    tasks = [{task for rank in ranks for task in rank.batch(step, 0).task_ids.tolist()} for step in range(20)]
    assert all(len(of_step) == 1 for of_step in tasks) and len(set.union(*tasks)) == 3


def test_a_batch_depends_on_nothing_asked_before(usual: DataConfig, usual_batches: list[Batch]):
    fresh = build(usual)
    assert values_of(fresh.batch(20, 1)) == values_of(usual_batches[41])
    assert values_of(fresh.batch(4, 0)) == values_of(usual_batches[8])


def test_resumed_mixture_gives_the_batches_of_the_unbroken_run(usual: DataConfig, usual_batches: list[Batch]):
    resumed = build(usual)
    resumed.mixture.load_state(build(usual).mixture.state(25))
    steps = list(resumed.iterate(25, 5, num_workers=0))
    assert [values_of(batch) for step in steps for batch in step] == [values_of(batch) for batch in usual_batches[50:]]


def test_too_few_negatives_are_drawn_with_replacement(tmp_path: Path):
    config = data_config(tmp_path, {"few": [row_of("few", row, negatives=2) for row in range(20)]})
    batches = build(config, passages=6)
    batch = batches.batch(0, 0)
    blocks = [texts_of(batch.passage_tokens)[6 * i + 1 : 6 * i + 6] for i in range(12)]
    for row, block in zip(batch.rows.tolist(), blocks, strict=True):
        assert set(block) <= {f"t{k} few {row} neg {k}" for k in range(2)}
    assert len({tuple(text[-1] for text in block) for block in blocks}) > 5


def test_rows_without_negatives_borrow_positives_of_other_rows(tmp_path: Path):
    rows = [row_of("bare", row, negatives=0) for row in range(5)]
    batches = build(data_config(tmp_path, {"bare": rows}), passages=4)
    borrowed = set()
    for step in range(5):
        batch = batches.batch(step, 0)
        for i, row in enumerate(batch.rows.tolist()):
            positive, *others = texts_of(batch.passage_tokens)[4 * i : 4 * i + 4]
            assert f" bare {row} pos " in positive
            assert all(" pos " in text and f" bare {row} " not in text for text in others)
            borrowed.update(others)
    assert len(borrowed) == 10


@pytest.mark.parametrize(
    ("stage_negatives", "task_negatives", "num_rows", "words"),
    [
        ("group", "stage", 4, r"task bare \(.*bare.jsonl\) has no negative passages.*negatives=task"),
        ("world", "group", 4, "Row [0-3] of task bare .* Mine negatives"),
        ("world", "stage", 1, "The only row of task bare.*Add rows"),
    ],
)
def test_rows_without_negatives_are_an_error_where_nothing_may_be_borrowed(
    tmp_path: Path, stage_negatives: str, task_negatives: str, num_rows: int, words: str
):
    rows = [row_of("bare", row, negatives=0) for row in range(num_rows)]
    config = data_config(tmp_path, {"bare": rows}, bare=TaskConfig(negatives=task_negatives))
    with pytest.raises(ValueError, match=words):
        build(config, negatives=stage_negatives).batch(0, 0)
    alone = build(config, negatives=stage_negatives, passages=1).batch(0, 0)
    assert alone.document_ids.shape == (12,)


def test_known_positives_with_the_text_of_the_drawn_one_are_left_out(tmp_path: Path):
    row = row_of("same", 0, positives=1)
    row["positive_passages"] = [row["positive_passages"][0]] * 3
    batch = build(data_config(tmp_path, {"same": [row] * 3})).batch(0, 0)
    assert batch.known_positive_ids.shape == (12, 0)


def test_moving_a_batch_keeps_all_of_it(usual_batches: list[Batch]):
    moved = usual_batches[0].to("meta")
    assert moved.query_tokens.input_ids.device.type == moved.global_task_counts.device.type == "meta"
    assert values_of(usual_batches[0].to("cpu")) == values_of(usual_batches[0])


def test_rows_of_tokens_are_cut_by_slice_and_by_index():
    tokens = Tokens(torch.arange(6).reshape(3, 2), torch.ones(3, 2, dtype=torch.int64))
    assert tokens.rows(slice(1, 3)).input_ids.tolist() == [[2, 3], [4, 5]]
    assert tokens.rows(torch.tensor([2, 0])).input_ids.tolist() == [[4, 5], [0, 1]]
