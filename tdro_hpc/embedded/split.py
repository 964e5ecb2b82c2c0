"""A library in, its training part and its test part out, so that what is tested was never trained on."""

import hashlib

from tdro_hpc.embedded.sources import Library

TEST_SHARE = 0.1  # of modules
TEST_SHARE_NAMES = 0.15  # of names in all packages; a definition is tested where its module or its name is
TEST_SHARE_SECTIONS = 0.25  # of the sections of the language reference, which are few


def held_out(origin: str, *, share: float, seed: int) -> bool:
    """Whether an origin belongs to the test part: a hash of its name, so a newly installed package moves nothing."""
    digest = hashlib.sha256(f"{seed}/{origin}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def split_library(library: Library, *, seed: int) -> tuple[Library, Library]:
    """The training part and the test part.

    A definition is held out with its whole module, or with all definitions of its name in all packages: the tasks
    then see neither a sibling in the same file nor the same function of another library.
    """
    parts = Library(files=library.files), Library(files=library.files)

    def side(share: float, origin: str) -> Library:
        return parts[held_out(origin, share=share, seed=seed)]

    for item in library.definitions:
        by_name = held_out(f"name {item.leaf.lower().replace('_', '')}", share=TEST_SHARE_NAMES, seed=seed)
        (parts[1] if by_name else side(TEST_SHARE, item.origin)).definitions.append(item)
    for remark in library.comments:
        side(TEST_SHARE, remark.module).comments.append(remark)
    for remark in library.options:
        side(TEST_SHARE, remark.module).options.append(remark)
    for section in library.sections:
        side(TEST_SHARE_SECTIONS, f"section {section.title.lower()}").sections.append(section)
    return parts
