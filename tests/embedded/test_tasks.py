from tdro_hpc.embedded.docstrings import parse_docstring
from tdro_hpc.embedded.language import Section
from tdro_hpc.embedded.pairs import MAX_PASSAGE, MAX_QUERY, Pair
from tdro_hpc.embedded.sources import Definition, Library, Remark
from tdro_hpc.embedded.tasks_code import code_summary, comment_code, option_help, parameter_function, summary_code
from tdro_hpc.embedded.tasks_prose import language_reference, module_of_function, name_summary, summary_body
from tdro_hpc.embedded.tasks_relations import related_functions, same_function
from tdro_hpc.embedded.tasks_tables import character_names, error_descriptions

LONG = "It lies before the limit and never inside a word, because readers would trip over the two halves of it."
CODE = 'def find_cut(text):\n    if not text:\n        return find_cut(" ")\n    return text.rfind(" ")'


def define(package: str, name: str, text: str, kind: str = "function", **more) -> Definition:
    return Definition(package, f"{package}.core", name, kind, parse_docstring(text), **more)


def of(*definitions: Definition) -> Library:
    return Library(definitions=list(definitions))


def test_summary_body_parts_first_sentence_and_rest():
    library = of(define("cutter", "find", f"Find the best place.\n\n{LONG}"))
    assert summary_body(library) == [Pair("Find the best place.", (LONG,))]


def test_name_summary_spells_package_class_and_name():
    library = of(define("cutter", "TextTool.find_place", "Find the best place.", "method"))
    assert name_summary(library) == [Pair("cutter text tool find place", ("Find the best place.",))]


def test_module_of_function_shares_the_passage():
    about = define("cutter", "", "Cuts all sorts of texts.", "module")
    one = define("cutter", "find", "Find the best place for a cut.")
    two = define("cutter", "glue", "Put the two halves together again.")
    pairs = module_of_function(of(about, one, two))
    assert [pair.query for pair in pairs] == [one.doc.summary, two.doc.summary]
    assert {pair.positives for pair in pairs} == {("cutter.core: Cuts all sorts of texts.",)}


def test_language_reference_gives_a_paragraph_one_passage_whatever_the_query():
    sentence = "A cut divides a text. "
    section = Section("Cuts", (LONG, sentence + LONG), (("limit",), ("text", "word")), (("text.cut", LONG + " Yes."),))
    pairs = {pair.query: pair.positives for pair in language_reference(Library(sections=[section]))}
    assert pairs == {
        "What does text.cut do?": (LONG + " Yes.",),
        "How does Python define Cuts?": (LONG,),
        "Cuts. A cut divides a text.": (LONG,),
        "Cuts: text, word": (LONG,),
    }


def test_code_hides_the_name_and_both_directions_agree():
    library = of(define("cutter", "find_cut", "Find the last place for a cut.", code=CODE))
    (pair,) = code_summary(library)
    assert "find_cut" not in pair.query and pair.query.count("function") == 2
    assert pair.positives == ("Find the last place for a cut.",)
    assert summary_code(library) == [Pair(pair.positives[0], (pair.query,))]


def test_comment_and_option_tasks_drop_what_says_nothing():
    good = Remark("cutter", "Never cut inside of a word", "place = text.rfind(' ', 0, limit) or limit")
    library = Library(
        comments=[good, Remark("cutter", "Cut", good.text)],
        options=[Remark("cutter.main", "--limit", "last place for a cut"), Remark("cutter.main", "--x", "see above")],
    )
    assert comment_code(library) == [Pair(good.head, (good.text,))]
    assert option_help(library) == [Pair("cutter main --limit", ("last place for a cut",))]


def test_parameter_description_finds_every_function_that_takes_it():
    text = "Cut the text {}.\n\nParameters\n----------\nlimit : int\n    Last place that may be chosen.\n"
    library = of(*(define("cutter", name, text.format(name), parameters=("self", "limit")) for name in ("up", "down")))
    (pair,) = parameter_function(library)
    assert pair.query == "limit: Last place that may be chosen."
    assert pair.positives == ("up(limit): Cut the text up.", "down(limit): Cut the text down.")


def test_same_function_pairs_packages_and_only_shared_subjects():
    library = of(
        define("cutter", "rotate_image", "Turn an image upside down."),
        define("paster", "rotateImage", "Turn the image by an angle."),
        define("gluer", "rotate_image", "Refresh all passwords every month."),
        define("cutter", "Tool.rotate_image", "Turn an image, the slow way.", "method"),
    )
    pairs = {pair.query: set(pair.positives) for pair in same_function(library)}
    first, second, _, slow = (item.doc.summary for item in library.definitions)
    assert pairs == {first: {second}, second: {first, slow}, slow: {second}}


def test_related_functions_go_both_ways_and_find_the_nearest_of_a_name():
    library = of(
        define("cutter", "Text.cut", "Cut a text in two.\n\nSee Also\n--------\nglue : Undo.\n", "method"),
        define("cutter", "Text.glue", "Put halves together.", "method"),
        define("cutter", "Paper.glue", "Stick paper on paper.", "method"),
    )
    cut, glue = "cut: Cut a text in two.", "glue: Put halves together."
    assert related_functions(library) == [Pair(cut, (glue,)), Pair(glue, (cut,))]


def test_error_descriptions_cover_codes_and_exceptions():
    error = define("cutter", "CutError", "Raised when scissors are blunt.", "class")
    pairs = {pair.query: pair.positives for pair in error_descriptions(of(error))}
    assert pairs["CutError"] == ("Raised when scissors are blunt.",)
    assert pairs["errno ENOENT"] == ("operating system error: no such file or directory",)
    assert pairs["HTTP status not found"] == ("Nothing matches the given URI",)
    assert "signal SIGTERM" in pairs


def test_character_names_tell_capitals_apart():
    pairs = {pair.query: pair.positives for pair in character_names(Library())}
    assert pairs["&alpha; \u03b1"] == ("greek small letter alpha",)
    assert pairs["&Alpha; \u0391"] == ("greek capital letter alpha",)
    assert pairs["\u0416 U+0416"] == ("cyrillic capital letter zhe",)


def test_texts_of_all_tasks_keep_their_limits(library: Library):
    for task in (summary_body, code_summary, summary_code, comment_code, language_reference, same_function):
        for pair in task(library):
            assert len(pair.query) <= MAX_QUERY + 200, task.__name__  # a question quotes one whole sentence
            assert all(0 < len(text) <= MAX_PASSAGE for text in pair.positives), task.__name__
