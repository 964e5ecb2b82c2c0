from tdro_hpc.embedded.docstrings import parse_docstring
from tdro_hpc.embedded.sources import Definition, Library
from tdro_hpc.embedded.split import held_out, split_library


def test_every_source_lands_on_exactly_one_side(library: Library):
    train, test = split_library(library, seed=7)
    for whole, left, right in (
        (library.definitions, train.definitions, test.definitions),
        (library.comments, train.comments, test.comments),
        (library.options, train.options, test.options),
        (library.sections, train.sections, test.sections),
    ):
        assert len(left) + len(right) == len(whole)
        assert len(left) > len(right)
    assert test.definitions and test.sections


def test_a_name_is_on_one_side_in_all_packages_unless_its_module_is_held_out():
    doc = parse_docstring("Cut the text in two.")
    names = [f"name_{number}" for number in range(200)]
    definitions = [Definition(p, f"{p}.one", spelling, "function", doc) for n in names for p, spelling in
                   (("left", n), ("right", n.replace("_", "").upper()))]  # fmt: skip
    train, test = split_library(Library(definitions=definitions), seed=1)
    sides = [{item.leaf.lower().replace("_", "") for item in part.definitions} for part in (train, test)]
    assert not held_out("left.one", share=0.1, seed=1) and not held_out("right.one", share=0.1, seed=1)
    assert not sides[0] & sides[1]
    assert 10 < len(sides[1]) < 60  # 15 percent of 200


def test_share_of_held_out_origins_is_the_share_asked_for():
    held = sum(held_out(f"module {number}", share=0.2, seed=3) for number in range(5000))
    assert 900 < held < 1100  # 1000, standard deviation 28


def test_other_seed_holds_out_others():
    origins = [f"module {number}" for number in range(100)]
    sides = [[held_out(origin, share=0.5, seed=seed) for origin in origins] for seed in (1, 2)]
    assert sides[0] != sides[1]
