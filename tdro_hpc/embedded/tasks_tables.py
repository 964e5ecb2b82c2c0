"""Tasks made of the tables inside Python: error codes and characters. A library in, (query, passage) pairs out."""

import errno
import os
import signal
import unicodedata
from html.entities import html5
from http import HTTPStatus

from tdro_hpc.embedded.pairs import Pair, cut_prose, merged, name_in_words
from tdro_hpc.embedded.sources import Library
from tdro_hpc.embedded.tasks_prose import has_summary

_ERROR_ENDS = ("Error", "Exception", "Warning", "Interrupt", "Exit")
# Scripts with letters that have names of their own; ideographs and syllable blocks are numbered, not named.
_SCRIPTS = (
    "LATIN", "GREEK", "CYRILLIC", "ARMENIAN", "HEBREW", "ARABIC", "DEVANAGARI", "BENGALI", "TAMIL", "THAI", "GEORGIAN",
    "HIRAGANA", "KATAKANA", "BRAILLE", "ROMAN NUMERAL", "CIRCLED", "SUPERSCRIPT", "SUBSCRIPT", "VULGAR FRACTION",
)  # fmt: skip


def error_descriptions(library: Library) -> list[Pair]:
    """Codes and names of errors, signals and statuses -> what they mean."""
    pairs = []
    for status in HTTPStatus:
        if status.description:
            pairs.append((f"HTTP {status.value}", f"{status.phrase}: {status.description}"))
            pairs.append((f"HTTP status {name_in_words(status.name)}", status.description))
        else:
            pairs.append((f"HTTP {status.value}", status.phrase))
    for number in sorted(errno.errorcode):
        pairs.append((f"errno {errno.errorcode[number]}", f"operating system error: {os.strerror(number).lower()}"))
    for caught in sorted(signal.Signals, key=lambda item: item.value):
        words = signal.strsignal(caught) or ""
        pairs.append((f"signal {caught.name}", f"the process receives: {words.lower()}" if words else ""))
    for item in library.definitions:
        if item.kind == "class" and item.leaf.endswith(_ERROR_ENDS) and has_summary(item, 3):
            pairs.append((item.leaf, cut_prose(f"{item.doc.summary} {item.doc.body}", 200)))
    return merged(pairs)


def character_names(library: Library) -> list[Pair]:
    """A character, or its name in HTML -> its Unicode name. The same on every machine; no library is needed."""
    assert library is not None, "every task takes a library"
    pairs = []
    for entity in sorted(html5):
        if entity.endswith(";") and len(html5[entity]) == 1:
            name = unicodedata.name(html5[entity], "")
            pairs.append((f"&{entity} {html5[entity]}", name.lower()))
    for code in range(0xA1, 0x3100):
        name = unicodedata.name(chr(code), "")
        if name.startswith(_SCRIPTS):
            pairs.append((f"{chr(code)} U+{code:04X}", name.lower()))
    return merged(pairs, key=str)  # a letter and its capital are two characters
