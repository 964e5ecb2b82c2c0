import sys

import pytest

from tdro_hpc.embedded.language import read_sections

TOPIC = """The "cut" statement
*******************

The "cut" statement divides a text at the place that "limit" names, and leaves both of its parts behind.

   cut_stmt ::= "cut" expression ["," expression]

1. First the text is searched for the last space before the limit, and the space becomes the place of the cut.

text.split(sep)

   Divide the text at every separator, and return the list of the parts between the separators.

Short.
"""


@pytest.fixture
def topics(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    from pydoc_data import topics as module

    topics = {"cut": TOPIC, "cut-again": TOPIC.replace('cut" statement\n', 'same" statement\n', 1)}
    monkeypatch.setattr(module, "topics", topics)
    return topics


def test_section_has_prose_terms_and_entries(topics: dict[str, str]):
    section = read_sections()[0]
    assert section.title == "The cut statement"
    assert len(section.paragraphs) == 2
    assert section.terms[0] == ("cut", "limit")
    assert section.paragraphs[1].startswith("First the text")
    assert [name for name, _ in section.entries] == ["text.split"]
    assert section.entries[0][1].startswith("Divide the text")


def test_repeated_paragraphs_belong_to_the_first_topic(topics: dict[str, str]):
    assert [section.title for section in read_sections()] == ["The cut statement"]


def test_the_real_reference_has_questions_for_hundreds_of_rows():
    sections = read_sections()
    entries = {name for section in sections for name, _ in section.entries}
    assert {"str.join", "object.__init__"} <= entries
    assert sum(len(section.paragraphs) for section in sections) > 300
    assert len({section.title for section in sections}) == len(sections)


def test_python_without_topics_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(ValueError, match="libpython3-stdlib"):
        read_sections()
