"""Texts in, BM25 ranks out: hard negatives for training rows and a lexical baseline for evaluation.

Scores come from bm25s (the formula of Lucene, k1 0.9, b 0.4). This file only splits texts into words, breaks ties by
position and leaves out what must not be a negative. It never reads a file.
"""

import logging
import random
import re
from collections.abc import Sequence
from itertools import chain

import numpy as np

K1 = 0.9  # how fast a repeated word saturates
B = 0.4  # how much a long text is held back

# Scripts without spaces between words: kana, CJK ideographs, hangul.
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
_RUN = re.compile(rf"[{_UNSPACED}]+|[^\W_{_UNSPACED}]+")
_UNSPACED_START = re.compile(rf"[{_UNSPACED}]")


def split_words(text: str) -> list[str]:
    """Lower-case words of a text in order, English function words left out.

    Letters and digits make words, an underscore separates, so names in code fall into their parts. A run of Chinese,
    Japanese or Korean characters becomes its overlapping pairs (one character alone stays as it is).
    """
    from bm25s.stopwords import STOPWORDS_EN

    words: list[str] = []
    for run in _RUN.findall(text.lower()):
        if not _UNSPACED_START.match(run):
            if run not in STOPWORDS_EN:
                words.append(run)
        elif len(run) == 1:
            words.append(run)
        else:
            words += [run[start : start + 2] for start in range(len(run) - 1)]
    return words


def search_bm25(corpus: Sequence[str], queries: Sequence[str], top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """The best documents of each query.

    corpus, queries  texts; title and text of a document joined by the caller
    top_k            documents a query; fewer are returned where the corpus is smaller
    returns          ids [queries, k] int64 positions in `corpus`, scores [queries, k] float32, best first; equal scores
                     in the order of the corpus, documents without a word of the query at 0
    raises           ValueError for an empty corpus
    """
    import bm25s
    from bm25s.tokenization import Tokenized

    if not corpus:
        raise ValueError("BM25 got an empty corpus; it needs at least one document.")
    top_k = min(top_k, len(corpus))
    logging.getLogger("bm25s").setLevel(logging.WARNING)  # importing it switches its debug lines on
    # Word ids in order of first use: left to itself the library numbers them in the order of a set.
    vocabulary: dict[str, int] = {}
    word_ids = [[vocabulary.setdefault(word, len(vocabulary)) for word in split_words(text)] for text in corpus]
    ids = np.tile(np.arange(top_k, dtype=np.int64), (len(queries), 1))
    scores = np.zeros((len(queries), top_k), dtype=np.float32)
    query_words = [[word for word in split_words(query) if word in vocabulary] for query in queries]
    if not any(query_words):
        return ids, scores
    index = bm25s.BM25(k1=K1, b=B, method="lucene", backend="numpy")
    index.index(Tokenized(ids=word_ids, vocab=vocabulary), create_empty_token=False, show_progress=False)
    for row, words in enumerate(query_words):
        if words:
            ids[row], scores[row] = _top(index.get_scores(words), top_k)
    return ids, scores


def _top(scores: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions and values of the top_k highest scores, equal ones by position."""
    if top_k < len(scores):
        # Everything at or above the k-th value, so that a tie at the border is also broken by position.
        border = np.partition(scores, len(scores) - top_k)[len(scores) - top_k]
        candidates = np.flatnonzero(scores >= border)
    else:
        candidates = np.arange(len(scores))
    best = candidates[np.argsort(-scores[candidates], kind="stable")][:top_k]
    return best, scores[best]


def mine_hard_negatives(
    queries: Sequence[str],
    passages: Sequence[str],
    positives: Sequence[set[int]],
    *,
    count: int,
    skip_first: int = 0,
    seed: int,
) -> list[list[int]]:
    """Passages that share words with the query and are not its positives, best first.

    queries, passages  texts
    positives          of each query, positions of all passages known to answer it; passages with the text of one of
                       them (case and white space apart) are left out as well
    count              negatives a query; fewer only where the passages run out
    skip_first         ranks left out at the top, where unlabelled positives gather
    seed               passages without a word of the query are drawn at random to fill up
    returns            positions in `passages`, a list for each query
    raises             ValueError where queries and positives differ in number, or count < 1
    """
    if len(queries) != len(positives):
        raise ValueError(f"{len(queries)} queries came with {len(positives)} sets of positives; give one set a query.")
    if count < 1 or skip_first < 0:
        raise ValueError(f"count is {count} and skip_first is {skip_first}; they must be >= 1 and >= 0.")
    if not queries:
        return []
    keys = [" ".join(passage.lower().split()) for passage in passages]
    same_text: dict[str, list[int]] = {}
    for position, key in enumerate(keys):
        same_text.setdefault(key, []).append(position)
    blocked = [{twin for known in own for twin in same_text[keys[known]]} for own in positives]
    depth = count + skip_first + max(len(own) for own in blocked)
    ids, scores = search_bm25(passages, queries, depth)
    mined = []
    for row, own in enumerate(blocked):
        ranked = [int(i) for i, score in zip(ids[row], scores[row], strict=True) if score > 0 and int(i) not in own]
        chosen = _one_a_text(ranked[skip_first:], keys)[:count]
        left_out = own.union(ranked[:skip_first])
        mined.append(chosen + _fill(chosen, keys, left_out, count - len(chosen), random.Random(f"{seed}/{row}")))
    return mined


def _one_a_text(positions: list[int], keys: list[str]) -> list[int]:
    """The positions without later ones of the same text."""
    return list({keys[position]: position for position in reversed(positions)}.values())[::-1]


def _fill(chosen: list[int], keys: list[str], left_out: set[int], number: int, draws: random.Random) -> list[int]:
    """`number` further positions at random, outside `left_out`, each with a text that is not there yet."""
    if number <= 0:
        return []
    texts = {keys[position] for position in chosen}
    drawn: list[int] = []
    start = draws.randrange(len(keys))
    # Independent draws are nearly always enough; the walk through all positions makes it certain.
    attempts = (draws.randrange(len(keys)) for _ in range(8 * number))
    for position in chain(attempts, range(start, len(keys)), range(start)):
        if len(drawn) == number:
            break
        if position not in left_out and keys[position] not in texts:
            texts.add(keys[position])
            drawn.append(position)
    return drawn
