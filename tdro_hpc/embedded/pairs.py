"""What a task is made of: queries with the passages that answer them, and how texts are cut to size."""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

MAX_QUERY = 400  # characters
MAX_PASSAGE = 500  # characters
_WORD_BORDER = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|[_.\s-]+")
_VISIBLE = re.compile(r"[^\W_]+")


@dataclass(frozen=True)
class Pair:
    """One query with every passage known to answer it, at least one."""

    query: str
    positives: tuple[str, ...]


def normalised(text: str) -> str:
    """Lower-case letters and digits with single spaces: two texts that look the same to a reader are equal here."""
    return " ".join(_VISIBLE.findall(text.lower()))


def name_in_words(name: str) -> str:
    """The words of an identifier: JSONDecoder.raw_decode becomes "json decoder raw decode"."""
    return " ".join(part for part in _WORD_BORDER.split(name) if part).lower()


def cut_prose(text: str, limit: int) -> str:
    """The text up to the last word that ends within `limit` characters."""
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit + 1].rsplit(" ", 1)[0]


def cut_code(code: str, limit: int) -> str:
    """The code up to the last line that ends within `limit` characters; a longer first line is cut."""
    if len(code) <= limit:
        return code.rstrip()
    return (code[: limit + 1].rsplit("\n", 1)[0] if "\n" in code[: limit + 1] else code[:limit]).rstrip()


def merged(pairs: Iterable[tuple[str, str]], key: Callable[[str], str] = normalised) -> list[Pair]:
    """One Pair a query: passages of queries with an equal key are all its positives. Keeps the order.

    Leaves out pairs with an empty side and those whose two sides have an equal key.
    """
    queries: dict[str, str] = {}
    positives: dict[str, dict[str, str]] = {}
    for query, passage in pairs:
        query, passage = query.strip(), passage.strip()
        query_key, passage_key = key(query), key(passage)
        if query and passage and query_key != passage_key:
            queries.setdefault(query_key, query)
            positives.setdefault(query_key, {}).setdefault(passage_key, passage)
    return [Pair(query, tuple(positives[key].values())) for key, query in queries.items()]


def without_common_queries(pairs: list[tuple[str, str]], *, at_most: int) -> list[tuple[str, str]]:
    """The pairs whose query occurs at most so often: "Return a copy." asks for nothing in particular."""
    counts = Counter(normalised(query) for query, _ in pairs)
    return [pair for pair in pairs if counts[normalised(pair[0])] <= at_most]
