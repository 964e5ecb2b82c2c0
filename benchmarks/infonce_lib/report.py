"""Figures in, a table out that reads the same on the screen and in a Markdown page; with goals, met or missed."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from infonce_lib.implementations import IMPLEMENTATIONS
from infonce_lib.rounds import Figure


@dataclass
class Report:
    """One table with what stands around it."""

    title: str
    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)  # of implementations, for a legend under all tables
    verdicts: list[bool] = field(default_factory=list)  # of the goals looked at

    def text(self) -> str:
        """Markdown, its columns aligned."""
        if not self.rows:
            return f"### {self.title}\n\nNothing was measured.\n"
        widths = [max(len(row[k]) for row in [self.columns, *self.rows]) for k in range(len(self.columns))]
        lines = [_line(self.columns, widths), "|" + "|".join("-" * (width + 2) for width in widths) + "|"]
        lines += [_line(row, widths) for row in self.rows]
        notes = list(self.notes)
        if self.verdicts:
            notes.append(f"Goals met: {sum(self.verdicts)} of {len(self.verdicts)}.")
        return "\n".join([f"### {self.title}", "", *lines, "", *notes]) + "\n"


def _line(cells: Sequence[str], widths: list[int]) -> str:
    return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"


def legend(labels: list[str]) -> str:
    """What each implementation is, in the order in which their tables name them."""
    names = dict.fromkeys(label.removesuffix(" bf16") for label in labels)
    lines = [f"- {name}: {IMPLEMENTATIONS[name].note}" for name in names]
    if any(label.endswith(" bf16") for label in labels):
        lines.append("- bf16: with bfloat16 embeddings")
    return "\n".join(["### Implementations", "", *lines, ""]) if lines else ""


def ratio(top: Figure | None, bottom: Figure | None) -> float | None:
    """Median seconds over median seconds; None where one of them is not there."""
    if top is None or bottom is None or not top.samples or not bottom.samples:
        return None
    return top.seconds / bottom.seconds


def ratio_cell(top: Figure | None, bottom: Figure | None) -> str:
    """The ratio, with a star where others used the machine all the time; without a bottom the time itself."""
    value = ratio(top, bottom)
    if value is None or top is None or bottom is None:
        return seconds_cell(top)
    return f"{value:.2f}" + ("*" if top.disturbed or bottom.disturbed else "")


def seconds_cell(figure: Figure | None) -> str:
    """Median time of a call, with a star as in ratio_cell; else why there is none."""
    if figure is None or not figure.samples:
        return (figure.failed if figure else "") or "-"
    milliseconds = 1000 * figure.seconds
    text = f"{milliseconds:.3g} ms" if milliseconds < 1000 else f"{figure.seconds:.3g} s"
    return text + ("*" if figure.disturbed else "")


def megabytes(number: float) -> str:
    """Bytes as MB of 2**20."""
    return f"{number / 2**20:.0f}"


def verdict(report: Report, value: float, limit: float) -> str:
    """met or missed, noted in the report."""
    report.verdicts.append(value <= limit)
    return "met" if value <= limit else "missed"


STAR = "`*`: other programs used more of the machine than `foreign` says during every repetition."
