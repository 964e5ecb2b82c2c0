"""Symmetric tasks: both sides are descriptions of functions. A library in, (query, passage) pairs out."""

from collections import defaultdict

from tdro_hpc.embedded.pairs import Pair, cut_prose, merged, name_in_words, normalised
from tdro_hpc.embedded.sources import Definition, Library
from tdro_hpc.embedded.tasks_prose import has_summary

SAME_SUBJECT = 0.34  # share of content words; below, a common name such as `run` mostly means something else
_FILLER = {
    "a", "an", "the", "of", "for", "to", "in", "and", "or", "is", "it", "this", "that", "with", "by", "from", "on",
    "return", "returns", "given", "if", "as", "be", "compute", "computes", "get", "new", "class", "function", "one",
    "value", "values", "method", "all", "are", "at", "used", "which", "element", "object", "array",
}  # fmt: skip


def description(definition: Definition) -> str:
    """First sentences of a docstring, without the name."""
    return cut_prose(f"{definition.doc.summary} {definition.doc.body}", 250)


def _content(text: str) -> set[str]:
    """Beginnings of the words that say something: enough to see that two sentences share a subject."""
    return {word[:5] for word in normalised(text).split() if word not in _FILLER and len(word) > 1}


def _share_subject(one: str, other: str) -> bool:
    """Whether two sentences have a third of their content words in common."""
    left, right = _content(one), _content(other)
    return len(left & right) >= max(1, SAME_SUBJECT * len(left | right))


def same_function(library: Library) -> list[Pair]:
    """A description -> that of a function of the same name in another package, where they share a subject."""
    groups: dict[str, list[Definition]] = defaultdict(list)
    for item in library.definitions:
        if item.kind != "module" and not item.leaf.startswith("_") and has_summary(item, 3):
            groups[item.leaf.lower().replace("_", "")].append(item)
    pairs = []
    for group in groups.values():
        for one in group:
            for other in group:
                if one.package != other.package and _share_subject(one.doc.summary, other.doc.summary):
                    pairs.append((description(one), description(other)))
    return merged(pairs)


def related_functions(library: Library) -> list[Pair]:
    """A function with its description -> one that its docstring lists under See Also."""
    by_leaf: dict[tuple[str, str], list[Definition]] = defaultdict(list)
    for item in library.definitions:
        if item.kind != "module" and has_summary(item, 3):
            by_leaf[item.package, item.leaf].append(item)
    pairs = []
    for item in library.definitions:
        for name in item.doc.related if has_summary(item, 3) else ():
            found = _nearest(item, name, by_leaf.get((item.package, name.rpartition(".")[2]), []))
            if found is not None and found is not item:
                pairs.append((_named(item), _named(found)))
                pairs.append((_named(found), _named(item)))
    return merged(pairs)


def _nearest(item: Definition, name: str, candidates: list[Definition]) -> Definition | None:
    """The definition that a See Also entry means: of the class it names, else of the same module, else the only one."""
    if "." in name:
        candidates = [found for found in candidates if f"{found.module}.{found.name}".endswith(name)] or candidates
    same_owner = [found for found in candidates if found.name.rpartition(".")[0] == item.name.rpartition(".")[0]]
    near = [found for found in same_owner if found.module == item.module] or same_owner or candidates
    return near[0] if len(near) == 1 or same_owner else None


def _named(item: Definition) -> str:
    return f"{name_in_words(item.leaf)}: {cut_prose(item.doc.summary, 200)}"
