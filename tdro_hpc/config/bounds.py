"""A value and what it must be in, a sentence for the person who typed it out. Shared by the sections of the schema."""


def require(problems: list[str]) -> None:
    """Raise one ValueError with all problems of a section, a line each; nothing when there is none."""
    if problems:
        raise ValueError("\n".join(problems))


def one_of(key: str, value: str, choices: tuple[str, ...]) -> list[str]:
    """A problem unless the value is one of the choices."""
    if value in choices:
        return []
    return [f"{key} is {value!r}; it must be one of {', '.join(choices)}."]


def above(key: str, value: float, bound: float, usual: str) -> list[str]:
    """A problem unless value > bound."""
    if value > bound:
        return []
    return [f"{key} is {value}; it must be > {bound:g} (usual: {usual})."]


def at_least(key: str, value: float, bound: float, usual: str) -> list[str]:
    """A problem unless value >= bound."""
    if value >= bound:
        return []
    return [f"{key} is {value}; it must be >= {bound:g} (usual: {usual})."]


def between(key: str, value: float, low: float, high: float, usual: str) -> list[str]:
    """A problem unless low <= value <= high."""
    if low <= value <= high:
        return []
    return [f"{key} is {value}; it must lie between {low:g} and {high:g} (usual: {usual})."]
