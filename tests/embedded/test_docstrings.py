from tdro_hpc.embedded.docstrings import first_sentence, parse_docstring, plain

NUMPY = """
    where_to_cut(text, limit)

    Find the place of a cut.  It lies before ``limit``
    and never inside a word.

    .. versionadded:: 1.2

       Works on `bytes` too.

    Parameters
    ----------
    text : str
        What is cut, see :func:`~cutter.split`.
    limit, bound : int, optional
        Last place that may be chosen.

        Negative ones count from the end.

    See Also
    --------
    split, cutter.join : Neighbours.
    join_all

    Notes
    -----
    Slow for long texts.

    Examples
    --------
    >>> where_to_cut("a b", 2)
    1
    """

GOOGLE = """Loads a thing.

    Args:
        path (`str`): Where the thing
            lies on the disk.
        mode: How to open it, in one letter of a few.

    Returns:
        The thing.
    """


def test_numpydoc_falls_into_its_parts():
    doc = parse_docstring(NUMPY)
    assert doc.summary == "Find the place of a cut."
    assert doc.body == "It lies before limit and never inside a word."
    assert doc.parameters == (("text", "What is cut, see split."), ("limit", "Last place that may be chosen."))
    assert doc.related == ("split", "cutter.join", "join_all")
    assert doc.example == '>>> where_to_cut("a b", 2)\n1'


def test_google_arguments_keep_their_continuation_lines():
    doc = parse_docstring(GOOGLE)
    assert doc.summary == "Loads a thing."
    assert doc.body == ""
    assert [name for name, _ in doc.parameters] == ["path", "mode"]
    assert doc.parameters[1][1] == "How to open it, in one letter of a few."


def test_google_description_is_whole():
    assert parse_docstring(GOOGLE).parameters[0][1] == "Where the thing lies on the disk."


def test_sphinx_fields_are_parameters():
    doc = parse_docstring("Open it.\n\n:param str path: where it lies\n:param mode: how\n:returns: it")
    assert doc.parameters == (("path", "where it lies"), ("mode", "how"))
    assert doc.summary == "Open it."


def test_notes_stand_in_for_a_missing_body():
    text = "Cut.\n\nNotes\n-----\nSlow for long texts.\n"
    assert parse_docstring(text).body == "Slow for long texts."


def test_signatures_of_compiled_functions_are_no_summary():
    assert parse_docstring("abs(x, /) -> number\n\nReturn the size of x.").summary == "Return the size of x."
    assert parse_docstring("S.insert(index, value) -- put value before index").summary == "put value before index"


def test_code_tables_and_directives_are_no_prose():
    text = "Do it.\n\n    indented code\n\n.. note:: inside\n\n>>> session\n\n- list\n\nName ---- Value\n\nReal prose."
    assert parse_docstring(text).body == "Real prose."


def test_empty_docstring_has_empty_parts():
    doc = parse_docstring("   \n ")
    assert (doc.summary, doc.body, doc.parameters, doc.related, doc.example) == ("", "", (), (), "")


def test_plain_removes_markup_and_keeps_the_words():
    text = "See :py:meth:`~a.b.Cutter.cut`, ``x*y``, *very* `good <https://x.org/a>`_ {input} ."
    assert plain(text) == "See cut, x*y, very good."


def test_sentence_does_not_end_at_an_abbreviation():
    assert first_sentence("Cut, e.g. The cake. Then eat.") == ("Cut, e.g. The cake.", "Then eat.")
