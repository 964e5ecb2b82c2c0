"""Tasks of English prose: a library in, (query, passage) pairs out. One function a task."""

from tdro_hpc.embedded.pairs import MAX_PASSAGE, Pair, cut_prose, merged, name_in_words, without_common_queries
from tdro_hpc.embedded.sources import Definition, Library

MIN_WORDS = 4  # of a summary that says something


def has_summary(definition: Definition, min_words: int = MIN_WORDS) -> bool:
    """Whether the docstring opens with a sentence of a usable length."""
    return min_words <= definition.doc.summary.count(" ") + 1 <= 40


def summary_body(library: Library) -> list[Pair]:
    """First sentence of a docstring -> the prose that follows it."""
    pairs = [
        (definition.doc.summary, cut_prose(definition.doc.body, MAX_PASSAGE))
        for definition in library.definitions
        if has_summary(definition) and len(definition.doc.body) >= 80
    ]
    return merged(without_common_queries(pairs, at_most=3))


def name_summary(library: Library) -> list[Pair]:
    """Package, class and function name in words -> first sentence of its docstring."""
    pairs = []
    for definition in library.definitions:
        if definition.kind != "module" and has_summary(definition) and not definition.leaf.startswith("__"):
            owner = definition.name.split(".")[-2:]
            package = "" if definition.package == "standard library" else definition.package + " "
            words = name_in_words(".".join(owner))
            if len(words.split()) >= 2:
                pairs.append((package + words, cut_prose(definition.doc.summary, 300)))
    return merged(pairs)


def module_of_function(library: Library) -> list[Pair]:
    """What one function or class does -> what its module is about. Many queries share a passage."""
    about = {
        definition.module: f"{definition.module}: {cut_prose(f'{definition.doc.summary} {definition.doc.body}', 300)}"
        for definition in library.definitions
        if definition.kind == "module" and has_summary(definition)
    }
    pairs = [
        (definition.doc.summary, about[definition.module])
        for definition in library.definitions
        if definition.kind in ("function", "class") and definition.module in about and has_summary(definition, 6)
    ]
    return merged(without_common_queries(pairs, at_most=2))


def language_reference(library: Library) -> list[Pair]:
    """Questions, headings and key terms -> paragraphs of the language reference and of the built-in functions."""
    pairs: list[tuple[str, str]] = []
    for section in library.sections:
        for name, description in section.entries:
            question = "When is {} called?" if name.rpartition(".")[2].startswith("__") else "What does {} do?"
            pairs.append((question.format(name), cut_prose(description, MAX_PASSAGE)))
        for number, (paragraph, terms) in enumerate(zip(section.paragraphs, section.terms, strict=True)):
            pairs += _questions(section.title, paragraph, terms, is_first=number == 0)
    for definition in library.definitions:
        if definition.module in ("builtins", "itertools", "math", "posix", "_socket") and has_summary(definition):
            module = {"builtins": "", "posix": "os.", "_socket": "socket."}.get(
                definition.module, definition.module + "."
            )
            text = f"{definition.doc.summary} {definition.doc.body}"
            pairs.append((f"What is {module}{definition.name} for?", cut_prose(text, MAX_PASSAGE)))
    return merged(pairs)


def _questions(title: str, paragraph: str, terms: tuple[str, ...], *, is_first: bool) -> list[tuple[str, str]]:
    """Up to two queries for a paragraph, which is always the same passage: in two cuts it would be its own negative."""
    sentence, _, rest = paragraph.partition(". ")
    pairs = []
    passage = cut_prose(paragraph, MAX_PASSAGE)
    if is_first:
        pairs.append((f"How does Python define {title}?", passage))
    elif len(rest) >= 80:
        passage = cut_prose(rest, MAX_PASSAGE)
        pairs.append((f"{title}. {sentence}.", passage))
    if len(terms) >= 2:
        pairs.append((f"{title}: {', '.join(terms[:4])}", passage))
    return pairs
