"""The topics of `pydoc` in (the language reference, as every Python carries it), sections with paragraphs out."""

import re
from dataclasses import dataclass

from tdro_hpc.embedded.docstrings import plain

_ENTRY = re.compile(r"^(?:class |exception )?([A-Za-z_][\w.]*)(\(.*\))?$")
_BULLET = re.compile(r"^(?:\d+\.|[*-])\s+")
MIN_PARAGRAPH = 80  # characters; shorter ones are glue between examples


@dataclass(frozen=True)
class Section:
    """One titled stretch of the reference."""

    title: str
    paragraphs: tuple[str, ...]  # prose, one line each
    terms: tuple[tuple[str, ...], ...]  # of each paragraph, the names it quotes
    entries: tuple[tuple[str, str], ...]  # (name, description) of functions, methods and attributes


def read_sections() -> list[Section]:
    """All sections, each title once, in the order of the topics' names.

    Topics repeat each other: a paragraph belongs to the section that has it first.
    raises  ValueError  where this Python lacks pydoc_data (some distributions put it into a package of its own)
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise ValueError(
            "This Python has no module pydoc_data, from which the task language_reference is made. "
            "Install the full standard library (on Debian: apt-get install libpython3-stdlib)."
        ) from None
    seen: set[str] = set()
    sections: dict[str, Section] = {}
    for name in sorted(topics):
        for title, lines in _titled(topics[name].splitlines()):
            section = _section(title, lines, seen)
            if title not in sections:
                sections[title] = section
            else:
                first = sections[title]
                sections[title] = Section(
                    title,
                    first.paragraphs + section.paragraphs,
                    first.terms + section.terms,
                    first.entries + section.entries,
                )
    return [section for section in sections.values() if section.paragraphs or section.entries]


def _titled(lines: list[str]) -> list[tuple[str, list[str]]]:
    """(title, lines) for each heading, which is a line over a line of *, =, - or ~."""
    parts: list[tuple[str, list[str]]] = []
    for number, line in enumerate(lines):
        follows = lines[number + 1] if number + 1 < len(lines) else ""
        if line[:1].strip() and len(follows) >= 3 and follows[0] in "*=-~" and len(set(follows)) == 1:
            title = re.sub(r"^[\d.]+\s+", "", plain(line.replace('"', "")))
            parts.append((title, []))
        elif parts and not (line and len(set(line)) == 1 and line[0] in "*=-~"):
            parts[-1][1].append(line)
    return parts


def _section(title: str, lines: list[str], seen: set[str]) -> Section:
    paragraphs, terms, entries = [], [], []
    entry, entry_indent = "", 0
    for block in _blocks(lines):
        indent = len(block[0]) - len(block[0].lstrip())
        text = _BULLET.sub("", " ".join(line.strip() for line in block))
        match = _ENTRY.match(block[0].strip())
        if match and (match.group(2) or "." in match.group(1)):
            entry, entry_indent = match.group(1), indent
            continue
        if indent <= entry_indent:
            entry, entry_indent = "", 0 if indent == 0 else entry_indent
        if len(text) < MIN_PARAGRAPH or not _is_prose(text) or text in seen:
            continue
        seen.add(text)
        if entry:
            entries.append((entry, plain(text)))
            entry = ""
        else:
            paragraphs.append(plain(text))
            terms.append(tuple(dict.fromkeys(re.findall(r'"([^"\s]{2,30})"', text))))
    return Section(title, tuple(paragraphs), tuple(terms), tuple(entries))


def _blocks(lines: list[str]) -> list[list[str]]:
    blocks: list[list[str]] = [[]]
    for line in lines:
        if line.strip():
            blocks[-1].append(line)
        elif blocks[-1]:
            blocks.append([])
    return [block for block in blocks if block]


def _is_prose(text: str) -> bool:
    """Sentences and no grammar, session, table or change note."""
    if "::=" in text or text.startswith((">>>", "+-", "|", "#", "[", "New in", "Changed in", "See also")):
        return False
    letters = sum(character.isalpha() or character == " " for character in text)
    return text.rstrip('"):').endswith((".", "!", "?")) and letters > 0.8 * len(text)
