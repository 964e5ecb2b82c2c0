from tdro_hpc.data.record import Candidate, Record


def test_full_text_is_title_space_text_or_the_text_alone():
    assert Candidate("body", title="Head").full_text == "Head body"
    assert Candidate("body").full_text == "body"


def test_positives_are_label_one_and_negatives_all_others_in_order():
    candidates = tuple(Candidate(str(label), label=label) for label in (0, 1, -1, 1, 0))
    record = Record("q", candidates)
    assert [candidate.label for candidate in record.positives] == [1, 1]
    assert record.negatives == (candidates[0], candidates[2], candidates[4])


def test_equal_rows_make_equal_records():
    assert Record("q", (Candidate("a", scores={"ce": 1.0}),)) == Record("q", (Candidate("a", scores={"ce": 1.0}),))
