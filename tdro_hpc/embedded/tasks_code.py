"""Tasks with source code or signatures on one side: a library in, (query, passage) pairs out. One function a task."""

import re

from tdro_hpc.embedded.pairs import (
    MAX_PASSAGE,
    MAX_QUERY,
    Pair,
    cut_code,
    cut_prose,
    merged,
    name_in_words,
    without_common_queries,
)
from tdro_hpc.embedded.sources import Definition, Library
from tdro_hpc.embedded.tasks_prose import has_summary

_WORD = re.compile(r"\w+")
_COMMON_PARAMETERS = ("self", "cls", "args", "kwargs", "out", "ax")


def function_source(definition: Definition, limit: int) -> str:
    """Source of a function with its name replaced by `function`, or "" where too little remains to tell what it does.

    The name would give the answer away: it mostly repeats the docstring.
    """
    if definition.code.count("\n") < 3:
        return ""
    code = cut_code(definition.code, limit)
    return cut_code(_WORD.sub(lambda word: "function" if word[0] == definition.leaf else word[0], code), limit)


def code_summary(library: Library) -> list[Pair]:
    """Source of a function, its name and docstring taken out -> the docstring's first sentence."""
    pairs = [
        (function_source(definition, MAX_QUERY), cut_prose(definition.doc.summary, 300))
        for definition in library.definitions
        if definition.code and has_summary(definition, 5)
    ]
    return merged(pairs)


def summary_code(library: Library) -> list[Pair]:
    """The other direction, for the test set code_search: what a function does -> its source."""
    pairs = [
        (definition.doc.summary, function_source(definition, MAX_PASSAGE))
        for definition in library.definitions
        if definition.code and has_summary(definition, 5)
    ]
    return merged(without_common_queries(pairs, at_most=2))


def comment_code(library: Library) -> list[Pair]:
    """A comment -> the lines of code under it."""
    pairs = [
        (cut_prose(remark.head, 300), cut_code(remark.text, 400))
        for remark in library.comments
        if 5 <= remark.head.count(" ") + 1 and len(remark.text) >= 40
    ]
    return merged(without_common_queries(pairs, at_most=2))


def parameter_function(library: Library) -> list[Pair]:
    """A parameter's description -> what the function is called, takes and does. Common parameters fit many."""
    pairs = []
    for definition in library.definitions:
        if not has_summary(definition, 3) or definition.kind == "module":
            continue
        names = [name for name in definition.parameters if name not in _COMMON_PARAMETERS]
        signature = f"{definition.name}({', '.join(names[:6])})"
        passage = f"{signature}: {cut_prose(definition.doc.summary, 250)}"
        for name, description in definition.doc.parameters:
            if name not in _COMMON_PARAMETERS and len(description) >= 30:
                pairs.append((f"{name}: {cut_prose(description, 200)}", passage))
    return merged(without_common_queries(pairs, at_most=5))


def option_help(library: Library) -> list[Pair]:
    """A command-line option or setting -> its help."""
    pairs = []
    for remark in library.options:
        program = " ".join(dict.fromkeys(name_in_words(remark.module).split()[:1] + remark.module.split(".")[-1:]))
        if remark.text.count(" ") >= 3:
            pairs.append((f"{program} {remark.head}", cut_prose(remark.text, 300)))
    return merged(pairs)
