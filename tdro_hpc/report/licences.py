"""A folder of a model or of data in, the licence that its own files state out. Asks nobody and guesses nothing."""

from pathlib import Path

import yaml

NOT_STATED = "not stated"
_FILES = ("LICENSE*", "LICENCE*", "COPYING*")
_SHOWN = 100  # characters of a first line


def licence_of(folder: Path | None) -> str:
    """Identifier in the front matter of README.md, else the first line of a licence file, else `not stated`.

    folder  None where the files are not on this machine
    """
    if folder is None or not folder.is_dir():
        return NOT_STATED
    stated = _front_matter(folder / "README.md")
    name = stated.get("license_name") if stated.get("license") in ("other", None) else stated["license"]
    if isinstance(name, list):
        name = ", ".join(map(str, name))
    if name:
        return str(name)
    for pattern in _FILES:
        for path in sorted(folder.glob(pattern)):
            lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
            first = next((line for line in lines if line), "")
            if first:
                return f"{path.name}: {first[:_SHOWN]}"
    return NOT_STATED


def _front_matter(path: Path) -> dict:
    """The YAML between the first two lines of dashes; {} where there is none that can be read."""
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    if not lines or lines[0].strip() != "---" or "---" not in [line.strip() for line in lines[1:]]:
        return {}
    end = [line.strip() for line in lines[1:]].index("---") + 1
    try:
        found = yaml.safe_load("\n".join(lines[1:end]))
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}
