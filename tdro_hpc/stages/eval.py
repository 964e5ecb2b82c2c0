"""Retrieval quality of the models of a run on test sets: encode, search, score, compare.

What is finished is kept: scores of each model and test set under eval/out/scores, and vectors in embeddings beside the
stages, where they outlive an evaluation that is made again, with another model say.
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tdro_hpc.atomic import write_json, write_text
from tdro_hpc.config.schema import Config, EvalConfig
from tdro_hpc.encoders.backbone import load_encoder
from tdro_hpc.encoders.tokenization import load_tokenizer
from tdro_hpc.evaluation.beir import Collection, SetOptions, find_collections, load_options, open_collection
from tdro_hpc.evaluation.metrics import Ranking, score_run
from tdro_hpc.evaluation.runs import write_run
from tdro_hpc.evaluation.tables import SetFacts, SetScores, build_scores, format_table
from tdro_hpc.parallel.process import Process, any_rank, wait_for_all
from tdro_hpc.retrieval.bm25 import search_bm25
from tdro_hpc.retrieval.embeddings import read_note
from tdro_hpc.retrieval.encode import EncodingRun, Side, TextModel, encode_texts, model_fingerprint
from tdro_hpc.retrieval.progress import Progress
from tdro_hpc.retrieval.search import Hits, search_exact
from tdro_hpc.stages.graph import Stage, s2_variants, variant_label
from tdro_hpc.training.stop import Stopped, stop_flag

BM25 = "bm25"
BASELINE = "s0"  # what the others are compared with; the first column where there is no s0


@dataclass(frozen=True)
class Ranker:
    """One column of the table."""

    label: str
    folder: Path | None  # saved model; None = config.model as it is, or BM25


@dataclass(frozen=True)
class Evaluation:
    """What all models and test sets of one run share."""

    config: Config
    stage_dir: Path
    encoding: EncodingRun
    sets: list[Collection]

    @property
    def process(self) -> Process:
        return self.encoding.process

    @property
    def scores_dir(self) -> Path:
        return self.stage_dir / "out" / "scores"

    @property
    def embeddings_dir(self) -> Path:
        # Not in the folder of the stage: that is emptied when the stage is made again.
        return self.stage_dir.parent / "embeddings"


def run(config: Config, stage: Stage, run_dir: Path, process: Process) -> None:
    """Score every model of eval.models on every test set; makes out/scores and out/table.txt."""
    rankers = rankers_of(config, run_dir)
    sets = _open_sets(config, run_dir)
    evaluation = _evaluation(config, stage, run_dir, process, sets, rankers)
    for ranker in rankers:
        if ranker.label == BM25:
            _score_bm25(evaluation)
        else:
            _score_model(evaluation, ranker)
    if process.data_rank == 0:
        _write_tables(evaluation, [ranker.label for ranker in rankers])
    wait_for_all()


def rankers_of(config: Config, run_dir: Path) -> list[Ranker]:
    """The columns that eval.models asks for, each once, in its order.

    raises ValueError for a name that is neither a model of this run nor a folder, and for a model that is not there
    """
    names = [f"s2-{variant_label(choice)}" for choice in s2_variants(config)]
    variants = {name: run_dir / name for name in names}
    stages = {"s0": run_dir / "s0", "s1": run_dir / "s1", **variants}
    found: dict[str, Path | None] = {}
    for name in (name.strip() for name in config.eval.models.split(",") if name.strip()):
        if name in ("base", BM25):
            found[name] = None
        elif name == "s2":
            found.update({label: folder / "out" / "model" for label, folder in variants.items()})
        elif name in stages:
            found[name] = stages[name] / "out" / "model"
        elif Path(name).expanduser().is_dir():
            folder = Path(name).expanduser()
            label = _label_of(folder)
            if found.get(label, folder) != folder:
                raise ValueError(f"eval.models has two models that would be called {label!r}. Rename one folder.")
            found[label] = folder
        else:
            near = get_close_matches(name, ["base", BM25, "s2", *stages], n=1)
            raise ValueError(
                f"eval.models has {name!r}, which is no folder. "
                + (f"Did you mean {near[0]}? " if near else "")
                + f"It takes base, s2, {', '.join(stages)}, {BM25}, and folders of saved models, separated by commas."
            )
    for label, place in found.items():
        if place is not None and not place.is_dir():
            raise ValueError(f"eval.models has {label}, and {place} is not there. Run its stage first.")
    if not found:
        raise ValueError("eval.models is empty. Set eval.models=base,s0,s2.")
    return [Ranker(label, place) for label, place in found.items()]


def _label_of(folder: Path) -> str:
    """Name of a model folder for a column: its last two parts, without the out and model of a run directory."""
    parts = [part for part in folder.resolve().parts[1:] if part not in ("out", "model")]
    return "-".join(parts[-2:])


def folder_of_sets(config: Config, run_dir: Path) -> Path:
    """Folder of the test sets: eval.dir, or what stage prepare made where the data set is built on the spot.

    raises ValueError if there is neither
    """
    if config.eval.dir:
        return Path(config.eval.dir).expanduser()
    if config.data.builder:
        return run_dir / "prepare" / "out" / "data" / "test"
    raise ValueError("eval.dir is empty. Set eval.dir=<folder of test sets in BEIR layout>.")


def _open_sets(config: Config, run_dir: Path) -> list[Collection]:
    folder = folder_of_sets(config, run_dir)
    options = load_options(folder)
    unknown = sorted(options.keys() - {path.name for path in find_collections(folder, "")})
    if unknown:
        raise ValueError(f"{folder}/tests.yaml describes {', '.join(unknown)}, which {folder} does not hold.")
    return [
        open_collection(path, options=options.get(path.name, SetOptions()), cache_dir=config.data.cache_dir)
        for path in find_collections(folder, config.eval.sets)
    ]


def _evaluation(
    config: Config, stage: Stage, run_dir: Path, process: Process, sets: list[Collection], rankers: list[Ranker]
) -> Evaluation:
    num_models = sum(ranker.label != BM25 for ranker in rankers)
    progress = Progress(
        run_dir / stage.name / "metrics.jsonl",
        stage=stage.name,
        rows=num_models * sum(len(collection.documents) + len(collection.queries) for collection in sets),
        first_rank=process.data_rank == 0,
    )
    for collection in sets:
        sizes = f"{len(collection.queries):,} queries, {len(collection.documents):,} documents"
        progress.say(" | ".join([f"{stage.name} {collection.name}: {sizes}", *collection.notes]))
    encoding = EncodingRun(stage.name, config.eval.batch_tokens, process, stop_flag(), progress)
    return Evaluation(config, run_dir / stage.name, encoding, sets)


def _score_bm25(evaluation: Evaluation) -> None:
    """The lexical reference, by the first rank alone: it holds a whole corpus in memory."""

    def rank(collection: Collection) -> Iterator[tuple[str, Ranking]]:
        documents = [collection.documents.text(row) for row in range(len(collection.documents))]
        queries = [collection.queries.text(row) for row in range(len(collection.queries))]
        numbers, scores = search_bm25(documents, queries, evaluation.config.eval.top_k + 1)
        for name, ranking in _rankings(collection, 0, Hits(numbers, scores), evaluation.config.eval.top_k):
            yield name, [(document, score) for document, score in ranking if score > 0]  # 0 = no word in common

    for collection in evaluation.sets:
        key = {"model": BM25, "set": collection.fingerprint, "top_k": evaluation.config.eval.top_k}
        if not _is_scored(evaluation, BM25, collection, key) and evaluation.process.data_rank == 0:
            _keep_scores(evaluation, BM25, collection, key, dict(rank(collection)))
        wait_for_all()


def _score_model(evaluation: Evaluation, ranker: Ranker) -> None:
    """Encode, search and score every test set that is not scored yet with these weights and settings."""
    config, process, progress = evaluation.config, evaluation.process, evaluation.encoding.progress
    as_evaluated = dataclasses.replace(config.model, gradient_checkpointing=False)  # there is no backward pass
    encoder = load_encoder(as_evaluated, folder=ranker.folder, device=process.device, seed=config.seed)
    tokenizer = load_tokenizer(encoder.config, ranker.folder)  # a saved model knows its own pooling and end token
    identity = {
        "model": model_fingerprint(encoder, tokenizer),
        "pooling": encoder.config.pooling,
        "similarity": encoder.config.similarity,
        "bidirectional": encoder.config.bidirectional,
        "precision": encoder.config.autocast,
    }
    model = TextModel(encoder, tokenizer, encoder.width, identity)
    for collection in evaluation.sets:
        sides = sides_of(config.eval, collection.options, trained=ranker.folder is not None)
        key = {
            **identity,
            "set": collection.fingerprint,
            "sides": [asdict(side) for side in sides],
            "top_k": config.eval.top_k,
        }
        if _is_scored(evaluation, ranker.label, collection, key):
            progress.finish_texts(len(collection.documents) + len(collection.queries))
            continue
        run_of_all = _search(evaluation, ranker.label, collection, model, sides)
        if process.data_rank == 0:
            _keep_scores(evaluation, ranker.label, collection, key, run_of_all())
        wait_for_all()
    del encoder, model
    if process.device.type == "cuda":
        torch.cuda.empty_cache()  # the next model may be as large


def sides_of(config: EvalConfig, options: SetOptions, *, trained: bool) -> tuple[Side, Side]:
    """How documents and queries of a test set are encoded, in this order.

    trained  false for the base model: a prompt that it never saw in training only harms it
    """
    if not trained:
        instruction = config.base_instruction
    else:
        instruction = config.instruction if options.instruction is None else options.instruction
    before_documents = instruction if options.symmetric else ""
    return (
        Side("documents", before_documents, config.passage_max_tokens),
        Side("queries", instruction, config.query_max_tokens),
    )


def _search(
    evaluation: Evaluation, label: str, collection: Collection, model: TextModel, sides: tuple[Side, Side]
) -> Callable[[], dict[str, Ranking]]:
    """Ranks of every query, as a function for the first rank to call: each rank searches its share of the queries."""
    config, process = evaluation.config.eval, evaluation.process
    evaluation.encoding.progress.label = f"{label} on {collection.name}"
    folder = evaluation.embeddings_dir / label / collection.name
    documents = encode_texts(collection.documents, model, folder / "documents", sides[0], evaluation.encoding)
    queries = encode_texts(collection.queries, model, folder / "queries", sides[1], evaluation.encoding)
    shares = np.array_split(np.arange(queries.num_rows), process.data_size)
    # One more than asked for: the query itself may be among the documents.
    own = queries.rows(shares[process.data_rank])
    hits = search_exact(own, documents, top_k=config.top_k + 1, backend=config.search, device=process.device)
    np.savez(folder / f"hits-{process.data_rank}.npz", documents=hits.documents, scores=hits.scores)
    _leave_if_asked(evaluation)
    wait_for_all()

    def gathered() -> dict[str, Ranking]:
        run_of_all: dict[str, Ranking] = {}
        for rank, share in enumerate(shares):
            path = folder / f"hits-{rank}.npz"
            with np.load(path) as arrays:
                of_rank = Hits(arrays["documents"], arrays["scores"])
            if len(share):
                run_of_all.update(_rankings(collection, int(share[0]), of_rank, config.top_k))
            path.unlink()
        return run_of_all

    return gathered


def _leave_if_asked(evaluation: Evaluation) -> None:
    flag, progress = evaluation.encoding.stop, evaluation.encoding.progress
    if flag.agreed():
        reason = flag.reason or "another rank was asked to stop"
        raise Stopped(evaluation.encoding.stage, progress.rows_before, progress.rows, reason)


def _rankings(collection: Collection, first: int, hits: Hits, top_k: int) -> Iterator[tuple[str, Ranking]]:
    """(query id, its `top_k` documents) of queries from number `first` on, without the query's own document."""
    for row, (numbers, scores) in enumerate(zip(hits.documents.tolist(), hits.scores.tolist(), strict=True)):
        name = collection.queries.id(first + row)
        own = collection.own_documents.get(name)
        pairs = ((collection.documents.id(number), score) for number, score in zip(numbers, scores, strict=True))
        yield name, [(document, score) for document, score in pairs if document != own][:top_k]


def _scores_path(evaluation: Evaluation, label: str, collection: Collection) -> Path:
    return evaluation.scores_dir / "queries" / label / f"{collection.name}.json"


def _is_scored(evaluation: Evaluation, label: str, collection: Collection, key: dict[str, Any]) -> bool:
    """Whether the scores of this model on this set are there, made with these weights, texts and settings."""
    path = _scores_path(evaluation, label, collection)
    # The first rank looks for all: ranks that saw different things would wait for each other for ever.
    return any_rank(evaluation.process.data_rank == 0 and read_note(path).get("key") == key)


def _keep_scores(
    evaluation: Evaluation, label: str, collection: Collection, key: dict[str, Any], run_of_all: dict[str, Ranking]
) -> None:
    scores = score_run(run_of_all, collection.judgements)
    write_run(evaluation.scores_dir / "runs" / label / f"{collection.name}.trec", run_of_all, model=label)
    # Last: these scores say that the run file is whole.
    content = {"key": key, "means": scores.means, "queries": scores.per_query}
    write_json(_scores_path(evaluation, label, collection), content)
    figures = ", ".join(f"{metric} {value:.4f}" for metric, value in scores.means.items())
    evaluation.encoding.progress.say(f"{evaluation.encoding.stage} {label} on {collection.name}: {figures}")


def _write_tables(evaluation: Evaluation, labels: list[str]) -> None:
    scores = {label: {each.name: _load_scores(evaluation, label, each) for each in evaluation.sets} for label in labels}
    facts = {each.name: SetFacts(len(each.queries), len(each.documents), each.notes) for each in evaluation.sets}
    baseline = BASELINE if BASELINE in labels else labels[0]
    table = build_scores(scores, facts, baseline=baseline, seed=evaluation.config.seed)
    write_json(evaluation.scores_dir / "scores.json", table)
    write_text(evaluation.stage_dir / "out" / "table.txt", format_table(table))


def _load_scores(evaluation: Evaluation, label: str, collection: Collection) -> SetScores:
    kept = read_note(_scores_path(evaluation, label, collection))
    return SetScores(kept["queries"], kept["means"])
