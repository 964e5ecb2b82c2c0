from pathlib import Path

import pytest

from tdro_hpc.embedded import sources
from tdro_hpc.embedded.sources import Library, read_library

MODULE = '''"""Cuts texts. For people with scissors."""
import argparse

def cut(text, *, limit):
    """Cut a text
    in two.
    """
    # Never inside a word, that would hurt.
    # Really.
    place = text.rfind(" ", 0, limit)
    return text[:place]

class Cutter:
    """A tool."""
    if True:
        def sharpen(self):
            """Make the edge sharp."""

parser = argparse.ArgumentParser()
parser.add_argument("-l", "--limit", help="last place " "of a cut")
add_docstr(core.glue, r"""
glue(a, b) -> text

Put {two} parts together.
""".format(two="2"))
add_newdoc("core", "Paste", ("dry", """Wait for an hour."""))
'''


@pytest.fixture
def scissors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Library:
    package = tmp_path / "scissors"
    for name, text in (("__init__.py", MODULE), ("broken.py", '"""x"""\ndef ('), ("tests/extra.py", MODULE)):
        (package / name).parent.mkdir(exist_ok=True, parents=True)
        (package / name).write_text(text, "utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sources, "COMPILED", ())
    return read_library({"scissors": 10_000, "not_installed_anywhere": 10_000})


def test_definitions_are_found_with_kind_and_summary(scissors: Library):
    found = {(item.name, item.kind): item.doc.summary for item in scissors.definitions}
    assert found == {
        ("", "module"): "Cuts texts.",
        ("cut", "function"): "Cut a text in two.",
        ("Cutter", "class"): "A tool.",
        ("Cutter.sharpen", "method"): "Make the edge sharp.",
        ("core.glue", "function"): "Put parts together.",
        ("Paste.dry", "function"): "Wait for an hour.",
    }


def test_code_comes_without_its_docstring(scissors: Library):
    cut = next(item for item in scissors.definitions if item.name == "cut")
    assert "Cut a text" not in cut.code
    assert cut.code.startswith("def cut(text, *, limit):\n    # Never inside")
    assert cut.parameters == ("text", "limit")


def test_comment_is_joined_and_followed_by_its_code(scissors: Library):
    (comment,) = scissors.comments
    assert comment.head == "Never inside a word, that would hurt. Really."
    assert comment.text == 'place = text.rfind(" ", 0, limit)\nreturn text[:place]'


def test_option_takes_its_long_name_and_joined_help(scissors: Library):
    assert [(option.head, option.text) for option in scissors.options] == [("--limit", "last place of a cut")]


def test_broken_files_are_counted_and_test_folders_left_out(scissors: Library):
    assert scissors.unreadable == 1
    assert scissors.files == {"scissors": 1}


def test_help_in_field_metadata_is_an_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    text = 'class Settings:\n    """S."""\n    depth: int = field(default=1, metadata={"help": "how deep it goes"})\n'
    (tmp_path / "setpack").mkdir()
    (tmp_path / "setpack" / "__init__.py").write_text(text, "utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    (option,) = read_library({"setpack": 1000}).options
    assert (option.head, option.text) == ("--depth", "how deep it goes")


def test_byte_budget_stops_reading_after_the_best_documented_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "bigpack").mkdir()
    (tmp_path / "bigpack" / "__init__.py").write_text("x = 1\n" * 50 + '"""one"""\n', "utf-8")
    (tmp_path / "bigpack" / "rich.py").write_text('def f():\n    """Says what."""\n' * 60, "utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    library = read_library({"bigpack": 100})
    assert library.files == {"bigpack": 1}
    assert {item.module for item in library.definitions if item.package == "bigpack"} == {"bigpack.rich"}


def test_compiled_modules_have_docstrings_and_one_origin_each():
    library = read_library({})
    origins = {item.origin for item in library.definitions}
    assert "math:sqrt" in origins and "builtins:str.join" in origins
    summaries = {item.name: item.doc.summary for item in library.definitions if item.module == "math"}
    assert summaries["sqrt"] == "Return the square root of x."


def test_two_readings_give_the_same_library(library: Library):
    from tests.embedded.conftest import SMALL_PACKAGES

    assert read_library(SMALL_PACKAGES) == library
