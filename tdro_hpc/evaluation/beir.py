"""A folder in BEIR layout in, one test set out: documents, queries and judgements, with texts read when needed.

Ids and lengths are kept memory-mapped beside the files, so a corpus of any size opens at once the second time.
Encodes nothing and ranks nothing.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tdro_hpc.data.derived import derived_folder, stamp_of
from tdro_hpc.data.formats.folders import is_beir
from tdro_hpc.data.rowfile import RowFile, line_blocks, plain_file

OPTIONS_FILE = "tests.yaml"
SAME_ID = ("auto", "exclude", "keep")
_TEXTS_VERSION = "1"  # part of the file name: raise it when ids, lengths or fingerprint would come out differently
_ROW = '{"_id": "d1", "title": "may be left out", "text": "words"}'


@dataclass(frozen=True)
class SetOptions:
    """What tests.yaml may say about one test set."""

    instruction: str | None = None  # before the queries; None = eval.instruction
    symmetric: bool = False  # true = documents carry the instruction too
    # A document with the id of the query: exclude it from the ranking as BEIR does, keep it, or auto = exclude it where
    # it also holds the query's text. Small collections number queries and documents alike, and mean nothing by it.
    same_id: str = "auto"

    def __post_init__(self) -> None:
        if not isinstance(self.instruction, str | None) or not isinstance(self.symmetric, bool):
            raise ValueError("instruction must be a text and symmetric true or false.")
        if self.same_id not in SAME_ID:
            raise ValueError(f"same_id is {self.same_id!r}; it must be one of {', '.join(SAME_ID)}.")


class TextRows:
    """Texts of a JSONL file, or some of them: title and text joined by a space."""

    def __init__(self, file: RowFile, ids: np.ndarray, lengths: np.ndarray, fingerprint: str) -> None:
        """
        ids          bytes [rows], UTF-8           lengths  int64 [rows], characters
        fingerprint  hex digits that change when an id or a text does
        """
        self.ids, self.lengths, self.fingerprint = ids, lengths, fingerprint
        self._file = file
        self._rows: np.ndarray | None = None  # rows of the file; None = all
        self._by_id: np.ndarray | None = None  # rows in the order of their ids, made at the first look-up

    def __len__(self) -> int:
        return len(self.ids)

    def id(self, row: int) -> str:
        """The `_id` of a row."""
        return self.ids[row].decode()

    def text(self, row: int) -> str:
        """Title and text of a row."""
        return joined_text(json.loads(self._file.read(int(row if self._rows is None else self._rows[row]))))

    def some(self, rows: np.ndarray) -> "TextRows":
        """Only these rows, in this order."""
        mark = hashlib.blake2b(self.fingerprint.encode() + rows.astype(np.int64).tobytes(), digest_size=16).hexdigest()
        chosen = TextRows(self._file, np.asarray(self.ids[rows]), np.asarray(self.lengths[rows]), mark)
        chosen._rows = rows
        return chosen

    def rows_of(self, ids: list[str]) -> np.ndarray:
        """int64 [ids], the row of each id; -1 for one that is not here."""
        if not ids:
            return np.zeros(0, np.int64)
        wanted = np.array([name.encode() for name in ids])
        if self._by_id is None:
            self._by_id = np.argsort(self.ids, kind="stable")
        places = np.minimum(np.searchsorted(self.ids, wanted, sorter=self._by_id), len(self) - 1)
        rows = self._by_id[places]
        return np.where(self.ids[rows] == wanted, rows, -1)


@dataclass(frozen=True)
class Collection:
    """One test set. Only queries with a relevant document are in it."""

    name: str
    documents: TextRows
    queries: TextRows
    judgements: dict[str, dict[str, int]]  # query id -> document id -> grade
    own_documents: dict[str, str]  # query id -> id of the document that is left out of its ranking
    options: SetOptions
    notes: tuple[str, ...]  # what was left out, in words
    fingerprint: str  # changes when a text, a judgement or what is left out does


def joined_text(row: dict[str, Any]) -> str:
    """Title, a space and text, as BEIR joins them; the text alone where there is no title."""
    return f"{row.get('title') or ''} {row['text']}".strip()


def find_collections(folder: Path, names: str) -> list[Path]:
    """Folders of the test sets: `folder` itself where it is one, else those inside it, by name.

    names   eval.sets: names separated by commas; empty = all
    raises  ValueError naming what is missing
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder. Set eval.dir=<folder of test sets in BEIR layout>.")
    found = [folder] if is_beir(folder) else [entry for entry in sorted(folder.iterdir()) if is_beir(entry)]
    if not found:
        raise ValueError(
            f"{folder} holds no test set. Each is a folder with corpus.jsonl and queries.jsonl (or .gz) and "
            "qrels/test.tsv."
        )
    by_name = {path.name: path for path in found}
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        if name not in by_name:
            near = get_close_matches(name, by_name, n=1)
            raise ValueError(
                f"eval.sets names {name!r}, which {folder} does not hold. "
                + (f"Did you mean {near[0]}? " if near else "")
                + f"It holds: {', '.join(by_name)}."
            )
    return [by_name[name] for name in wanted] if wanted else found


def load_options(folder: Path) -> dict[str, SetOptions]:
    """What tests.yaml in `folder` says, by name of the test set; {} where there is no such file."""
    path = folder / OPTIONS_FILE
    if not path.is_file():
        return {}
    form = "expected are lines such as:\nclaims:\n  instruction: Given a claim, find documents that refute it"
    try:
        sections = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}; {form}") from error
    if not isinstance(sections, dict) or not all(isinstance(value, dict) for value in sections.values()):
        raise ValueError(f"{path}: {form}")
    known = [field.name for field in fields(SetOptions)]
    options = {}
    for name, section in sections.items():
        for key in section:
            if key not in known:
                raise ValueError(f"{path}: {name} has the key {key!r}; it knows {', '.join(known)}.")
        try:
            options[str(name)] = SetOptions(**section)
        except ValueError as error:
            raise ValueError(f"{path}: {name}: {error}") from error
    return options


def open_collection(folder: Path, *, options: SetOptions, cache_dir: str) -> Collection:
    """The test set in a folder; the first time its files are read once and ids and lengths are kept.

    cache_dir  place of what is kept; empty = beside the files
    raises     ValueError with file, line and what is expected
    """
    documents = open_texts(_part(folder, "corpus.jsonl"), cache_dir=cache_dir)
    all_queries = open_texts(_part(folder, "queries.jsonl"), cache_dir=cache_dir)
    qrels = _qrels_file(folder)
    judged = load_judgements(qrels)
    relevant = {query: grades for query, grades in judged.items() if max(grades.values()) >= 1}
    rows = all_queries.rows_of(list(relevant))
    missing = [query for query, row in zip(relevant, rows.tolist(), strict=True) if row < 0]
    if len(missing) == len(relevant):
        raise ValueError(
            f"{qrels} judges {len(judged)} queries, and none with a grade of 1 or more is in queries.jsonl"
            f" (such as {next(iter(judged))!r}). Its first column must hold the _id of a query."
        )
    queries = all_queries.some(np.sort(rows[rows >= 0]))
    judgements = {queries.id(row): relevant[queries.id(row)] for row in range(len(queries))}
    num_irrelevant = len(judged) - len(relevant)
    notes = _notes(documents, judgements, num_irrelevant=num_irrelevant, num_missing=len(missing), at=qrels)
    own = own_documents(documents, queries, judgements, same_id=options.same_id)
    content = json.dumps([documents.fingerprint, queries.fingerprint, judgements, own], sort_keys=True)
    mark = hashlib.blake2b(content.encode(), digest_size=16).hexdigest()
    return Collection(folder.name, documents, queries, judgements, own, options, notes, mark)


def _part(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise ValueError(f"{folder} has no {name} and no {name}.gz. A test set needs corpus, queries and qrels.")


def _qrels_file(folder: Path) -> Path:
    """qrels/test.tsv, or the only file of judgements."""
    files = sorted((folder / "qrels").glob("*.tsv"))
    if folder / "qrels" / "test.tsv" in files:
        return folder / "qrels" / "test.tsv"
    if len(files) == 1:
        return files[0]
    names = ", ".join(path.name for path in files) or "none"
    raise ValueError(f"{folder}/qrels needs test.tsv, or exactly one .tsv file; it has: {names}.")


def open_texts(path: Path, *, cache_dir: str) -> TextRows:
    """Texts of a JSONL file, plain or .gz.

    raises ValueError naming the line for what is not an object with `_id` and `text`, and for an id that comes twice
    """
    file = RowFile(path, cache_dir=cache_dir)
    plain, plain_cache = plain_file(path, cache_dir=cache_dir)
    kind = f"texts-v{_TEXTS_VERSION}"
    kept = derived_folder(
        plain,
        kind,
        stamp=stamp_of(plain),
        cache_dir=plain_cache,
        build=lambda folder: _survey(plain, folder, shown=path),
    )
    fingerprint = json.loads((kept / "facts.json").read_text())["fingerprint"]
    ids = np.load(kept / "ids.npy", mmap_mode="r")
    return TextRows(file, ids, np.load(kept / "lengths.npy", mmap_mode="r"), fingerprint)


def _survey(path: Path, folder: Path, *, shown: Path) -> None:
    """Read all rows once; write ids.npy, lengths.npy and facts.json."""
    digest = hashlib.blake2b(digest_size=16)
    id_pieces, length_pieces = [], []
    for block in _rows_by_block(path, shown):
        id_pieces.append(np.array([name for name, _ in block]))
        length_pieces.append(np.array([len(text) for _, text in block], np.int64))
        for name, text in block:
            digest.update(name + b"\0" + text.encode(errors="surrogatepass") + b"\0")
    if not id_pieces:
        raise ValueError(f"{shown} is empty; expected are lines such as {_ROW}")
    ids = np.concatenate(id_pieces)
    order = np.argsort(ids, kind="stable")
    twice = np.flatnonzero(ids[order[1:]] == ids[order[:-1]])
    if len(twice):
        first, second = order[twice[0]], order[twice[0] + 1]
        raise ValueError(
            f"{shown}: the _id {ids[first].decode()!r} comes twice, in rows {first + 1} and {second + 1}. "
            "Judgements could mean either; give each text its own id."
        )
    np.save(folder / "ids.npy", ids)
    np.save(folder / "lengths.npy", np.concatenate(length_pieces))
    (folder / "facts.json").write_text(json.dumps({"fingerprint": digest.hexdigest()}))


def _rows_by_block(path: Path, shown: Path) -> Iterator[list[tuple[bytes, str]]]:
    for block, _, starts, ends, first_line in line_blocks(path):
        rows = []
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            try:
                rows.append(_id_and_text(block[start:end]))
            except ValueError as error:
                line = first_line + block.count(b"\n", 0, start)
                raise ValueError(f"{shown}, line {line}: {error}; expected is a line such as {_ROW}") from error
        if rows:
            yield rows


def _id_and_text(line: bytes) -> tuple[bytes, str]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from error
    if not isinstance(row, dict):
        raise ValueError(f"a JSON {type(row).__name__}, not an object")
    for key in ("_id", "text"):
        if key not in row:
            raise ValueError(f"no {key!r} among the keys {', '.join(row) or '(none)'}")
    if not isinstance(row["text"], str) or not isinstance(row.get("title") or "", str):
        raise ValueError("text or title is not a string")
    return str(row["_id"]).encode(), joined_text(row)


def load_judgements(path: Path) -> dict[str, dict[str, int]]:
    """Grades by query and document of a BEIR qrels file: query-id, corpus-id and score between tabs.

    The first line may be a heading. raises ValueError naming the line
    """
    judgements: dict[str, dict[str, int]] = {}
    expected = "expected is: query id, tab, document id, tab, whole number (as in: q1<tab>d7<tab>1)"
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            columns = line.rstrip("\r\n").split("\t")
            if not line.strip() or (number == 1 and columns[-1:] == ["score"]):
                continue
            if len(columns) != 3 or not columns[2].strip().lstrip("+-").isdigit():
                raise ValueError(f"{path}, line {number}: got {line.rstrip()[:80]!r}; {expected}.")
            query, document, grade = columns[0], columns[1], int(columns[2])
            if judgements.setdefault(query, {}).setdefault(document, grade) != grade:
                raise ValueError(f"{path}, line {number}: {query} and {document} were graded otherwise before.")
    if not judgements:
        raise ValueError(f"{path} holds no judgements; {expected}.")
    return judgements


def own_documents(
    documents: TextRows, queries: TextRows, judgements: dict[str, dict[str, int]], *, same_id: str
) -> dict[str, str]:
    """Queries that are themselves documents, with the id of that document: see SetOptions.same_id."""
    if same_id == "keep":
        return {}
    names = [queries.id(row) for row in range(len(queries))]
    own = {}
    for row, document in enumerate(documents.rows_of(names).tolist()):
        name = names[row]
        if document < 0:
            continue
        # A judgement is better evidence than a guess from texts.
        guessed = judgements[name].get(name, 0) < 1 and queries.text(row) in documents.text(document)
        if same_id == "exclude" or guessed:
            own[name] = name
    return own


def _notes(
    documents: TextRows, judgements: dict[str, dict[str, int]], *, num_irrelevant: int, num_missing: int, at: Path
) -> tuple[str, ...]:
    relevant = sorted({name for grades in judgements.values() for name, grade in grades.items() if grade >= 1})
    present = documents.rows_of(relevant) >= 0
    if not present.any():
        raise ValueError(
            f"{at}: none of its {len(relevant)} relevant documents is in the corpus (such as {relevant[0]!r}). "
            "Its second column must hold the _id of a document."
        )
    counts = (
        (num_irrelevant, "judged queries have no relevant document and are left out"),
        (num_missing, "judged queries are not among the queries and are left out"),
        (int((~present).sum()), "relevant documents are not in the corpus and count as not found"),
    )
    return tuple(f"{count} {words}" for count, words in counts if count)
