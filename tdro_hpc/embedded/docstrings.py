"""One raw docstring in, its parts out: summary, body, parameters, relations, examples. Pure; reads no file.

Understands the layouts that scientific Python uses: numpydoc sections (a title over dashes), Google sections
(`Args:`), Sphinx fields (`:param x:`) and plain prose.
"""

import inspect
import re
from dataclasses import dataclass

_TITLES = (
    "parameters", "other parameters", "args", "arguments", "attributes", "returns", "return", "yields", "raises",
    "warns", "warnings", "see also", "notes", "note", "references", "examples", "example", "methods", "keyword args",
    "keyword arguments", "shape", "inputs", "outputs", "usage", "warning", "todo",
)  # fmt: skip
_PARAMETER_TITLES = ("parameters", "other parameters", "args", "arguments", "keyword args", "keyword arguments")
_ROLE = re.compile(r":[a-z:]+:`~?!?([^`<]*?)(?:\s*<[^`>]*>)?`")
_LINK = re.compile(r"\s*<https?://[^>]*>")
_TICKS = re.compile(r"`{1,2}([^`]+)`{1,2}_{0,2}")
_PLACEHOLDER = re.compile(r"(?<!\w)\{[a-z_]+\}|%\([a-z_]+\)s|\|[A-Za-z_]+\|")
_SENTENCE_END = re.compile(r"(?<!e\.g\.)(?<!i\.e\.)(?<!etc\.)(?<! vs\.)(?<! cf\.)(?<=[.!?])\s+(?=[A-Z\"'(0-9])")
_SIGNATURE = re.compile(r"^[\w.]+\(.*?\)\s*(->.*)?$|^[\w.]+\(.*->", re.DOTALL)
_CALL = re.compile(r"^[\w.]+\([^)]*\)\s+(?:-+>?|:)\s+")  # S.insert(index, value) -- what it does
_FIELD = re.compile(r"^:(?:param|parameter|arg)\s+(?:[\w.\[\], ]+\s+)?\*{0,2}(\w+):\s*(.*)$")
_NUMPY_PARAMETER = re.compile(r"^\*{0,2}(\w+)(?:\s*,\s*\*{0,2}\w+)*\s*(?::.*)?$")
_GOOGLE_PARAMETER = re.compile(r"^\*{0,2}`?(\w+)`?(?:\s*\([^)]*\)\s*)?:\s*(.*)$")


@dataclass(frozen=True)
class Docstring:
    """The parts of one docstring, inline markup removed. Every part but `summary` may be empty."""

    summary: str  # first sentence
    body: str  # prose after the first sentence, up to the first section; else the notes
    parameters: tuple[tuple[str, str], ...]  # (name, description)
    related: tuple[str, ...]  # names under See Also, as written
    example: str  # first doctest, prompts kept


def plain(text: str) -> str:
    """Prose on one line without reStructuredText roles, backticks, emphasis and template placeholders."""
    text = _LINK.sub("", text)
    text = _ROLE.sub(lambda match: match.group(1).rsplit(".", 1)[-1] or match.group(1), text)
    text = _TICKS.sub(lambda match: match.group(1).lstrip("~!"), text)
    text = _PLACEHOLDER.sub("", text)
    text = re.sub(r"(?<![\w*])\*{1,2}([A-Za-z][\w .,-]*?)\*{1,2}(?![\w*])", r"\1", text)
    return re.sub(r"\s+([.,;:])(?=\s|$)", r"\1", " ".join(text.split()))


def first_sentence(text: str) -> tuple[str, str]:
    """The first sentence of a prose text and what follows it."""
    parts = _SENTENCE_END.split(text, maxsplit=1)
    return parts[0].strip(), parts[1].strip() if len(parts) > 1 else ""


def parse_docstring(raw: str) -> Docstring:
    """The parts of a docstring as it stands in the source, indentation and all."""
    lines = inspect.cleandoc(raw).splitlines()
    lead, sections, fields = _split(lines)
    paragraphs = _prose(lead)
    while paragraphs and _SIGNATURE.match(paragraphs[0]):
        paragraphs = paragraphs[1:]
    if paragraphs:
        paragraphs[0] = _CALL.sub("", paragraphs[0])
    summary, rest = first_sentence(plain(paragraphs[0])) if paragraphs else ("", "")
    body = " ".join(part for part in (rest, *map(plain, paragraphs[1:])) if part)
    if not body:
        body = " ".join(map(plain, _prose(sections.get("notes", []))))
    parameters = list(fields)
    for title in _PARAMETER_TITLES:
        parameters += _parameters(sections.get(title, []))
    related = _related(sections.get("see also", []))
    return Docstring(summary, body, tuple(parameters), related, _example(lines))


def _split(lines: list[str]) -> tuple[list[str], dict[str, list[str]], list[tuple[str, str]]]:
    """Lines before the first section, lines of each section by lower-case title, and Sphinx parameters."""
    lead: list[str] = []
    sections: dict[str, list[str]] = {}
    fields: list[tuple[str, str]] = []
    current = lead
    for number, line in enumerate(lines):
        title = line.strip().rstrip(":").lower()
        follows = lines[number + 1].strip() if number + 1 < len(lines) else ""
        underlined = len(follows) >= 3 and set(follows) in ({"-"}, {"="}, {"~"})
        if line[:1].strip() and title in _TITLES and (underlined or line.rstrip().endswith(":")):
            current = sections.setdefault(title, [])
        elif line.startswith(":"):
            match = _FIELD.match(line)
            current = sections.setdefault("fields", [])
            if match:
                fields.append((match.group(1), plain(match.group(2))))
        elif not (len(line) >= 2 and set(line.strip()) <= set("-=~") and line.strip()):
            current.append(line)
    return lead, sections, fields


def _prose(lines: list[str]) -> list[str]:
    """Paragraphs of running text: no code, no lists of options, no directives with what is indented under them."""
    paragraphs: list[str] = []
    block: list[str] = []
    in_directive = False
    for line in [*lines, ""]:
        if line.strip():
            block.append(line)
            continue
        if block:
            indented = block[0].startswith((" ", "\t"))
            in_directive = block[0].startswith("..") or (in_directive and indented)
            text = "\n".join(block)
            is_table = text.startswith((">", "+-", "| ", "* ", "- ")) or "----" in text
            if not (indented or in_directive or is_table or "::" in block[0]):
                paragraphs.append(" ".join(text.split()))
        block = []
    return paragraphs


def _parameters(lines: list[str]) -> list[tuple[str, str]]:
    """(name, description) of a numpydoc or Google parameter section."""
    lines = inspect.cleandoc("\n".join(["", *lines])).splitlines()
    found: list[tuple[str, list[str]]] = []
    for line in lines:
        if line.startswith((" ", "\t")) or not line:
            if found:
                found[-1][1].append(line)
        elif (google := _GOOGLE_PARAMETER.match(line)) and (google.group(2).count(" ") >= 3 or "(" in line):
            found.append((google.group(1), [google.group(2)]))
        elif numpy := _NUMPY_PARAMETER.match(line):
            found.append((numpy.group(1), []))
    described = []
    for name, description in found:
        paragraphs = _prose(inspect.cleandoc("\n".join(description)).splitlines())
        if paragraphs:
            described.append((name, plain(paragraphs[0])))
    return described


def _related(lines: list[str]) -> tuple[str, ...]:
    names: list[str] = []
    for line in inspect.cleandoc("\n".join(["", *lines])).splitlines():
        if line[:1].strip():
            head = plain(line.split(" : ")[0])
            names += [part.strip() for part in head.split(",") if re.fullmatch(r"\s*[A-Za-z_][\w.]*\s*", part)]
    return tuple(dict.fromkeys(names))


def _example(lines: list[str]) -> str:
    """The first doctest up to the next empty line, indentation removed."""
    block: list[str] = []
    for line in lines:
        if line.lstrip().startswith(">>>") or (block and line.strip()):
            block.append(line)
        elif block:
            break
    return inspect.cleandoc("\n".join(["", *block])) if block else ""
