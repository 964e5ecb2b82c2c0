"""A BEIR or MS MARCO folder, or one of its judgement files in; the paths of its parts out. Reads no content."""

from pathlib import Path

from tdro_hpc.data.formats.joined import JoinedFiles

PACKINGS = ("", ".gz")
RUN_ENDINGS = (".tsv", ".trec", ".txt", ".run", "")


def is_beir(folder: Path) -> bool:
    """Whether a folder has the three parts of a BEIR data set."""
    return bool(_packed(folder / "corpus.jsonl") and _packed(folder / "queries.jsonl") and (folder / "qrels").is_dir())


def is_msmarco(folder: Path) -> bool:
    """Whether a folder has an MS MARCO collection."""
    return _packed(folder / "collection.tsv") is not None


def beir_files(path: Path) -> JoinedFiles:
    """Parts of a BEIR folder; `path` is the folder, or the qrels file of the split that is meant.

    Mined negatives, where there are any, lie in runs/<split>.tsv or .trec.
    """
    folder = path if path.is_dir() else path.parent.parent
    judgements = path if path.is_file() else _chosen_split(folder, sorted((folder / "qrels").glob("*.tsv*")))
    split = judgements.name.split(".tsv")[0]
    return JoinedFiles(
        judgements=judgements,
        queries=_required(folder / "queries.jsonl"),
        documents=_required(folder / "corpus.jsonl"),
        run=_run(folder / "runs" / split),
        key="json_id",
    )


def msmarco_files(path: Path) -> JoinedFiles:
    """Parts of an MS MARCO folder; `path` is the folder, or the qrels file of the split that is meant.

    Queries and run have the name of the qrels file with `queries` and `run` in the place of `qrels`; queries.tsv
    serves all splits.
    """
    folder = path if path.is_dir() else path.parent
    judgements = path if path.is_file() else _chosen_split(folder, sorted(folder.glob("qrels*.tsv*")))
    stem = judgements.name.split(".tsv")[0]
    queries = _packed(folder / f"{stem.replace('qrels', 'queries')}.tsv") or _required(folder / "queries.tsv")
    return JoinedFiles(
        judgements=judgements,
        queries=queries,
        documents=_required(folder / "collection.tsv"),
        run=_run(folder / stem.replace("qrels", "run")),
        key="first_field",
    )


def _packed(path: Path) -> Path | None:
    """The file, or its .gz; None where neither is."""
    packings = [path.with_name(path.name + ending) for ending in PACKINGS]
    return next((packing for packing in packings if packing.is_file()), None)


def _required(path: Path) -> Path:
    found = _packed(path)
    if found is None:
        raise ValueError(f"{path.parent} has no {path.name} and no {path.name}.gz. Put it there.")
    return found


def _run(stem: Path) -> Path | None:
    found = [_packed(stem.with_name(stem.name + ending)) for ending in RUN_ENDINGS]
    return next((path for path in found if path is not None), None)


def _chosen_split(folder: Path, files: list[Path]) -> Path:
    """The one qrels file, or the one for training."""
    training = [path for path in files if "train" in path.name]
    chosen = training if len(files) > 1 else files
    if len(chosen) == 1:
        return chosen[0]
    names = ", ".join(str(path.relative_to(folder)) for path in files) or "none"
    example = files[0].relative_to(folder) if files else "qrels/train.tsv"
    raise ValueError(
        f"{folder} has {len(files)} judgement files ({names}), and {len(training)} of them are for training. "
        f"Name the one that is meant: file: {folder.name}/{example}"
    )
