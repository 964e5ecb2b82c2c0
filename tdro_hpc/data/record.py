"""One query with its candidates: what every format is turned into, and all that batches know of the data."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Candidate:
    """One passage of a record."""

    text: str
    title: str = ""
    id: str = ""  # the data's own id; empty = it gives none
    label: int = 0  # 1 positive, 0 mined and unjudged, -1 judged negative
    source: str = ""  # who proposed it: bm25, dense-1 ...; empty = the data itself
    scores: dict[str, float] = field(default_factory=dict)  # teacher name -> score, higher is better

    @property
    def full_text(self) -> str:
        """Title, a space and the text; the text alone where there is no title."""
        return f"{self.title} {self.text}" if self.title else self.text


@dataclass(frozen=True)
class Record:
    """One row of a task. Every converter gives at least one positive."""

    query: str
    candidates: tuple[Candidate, ...]
    query_id: str = ""
    answers: tuple[str, ...] = ()

    @property
    def positives(self) -> tuple[Candidate, ...]:
        """Candidates with label 1, in the order of the row."""
        return tuple(candidate for candidate in self.candidates if candidate.label == 1)

    @property
    def negatives(self) -> tuple[Candidate, ...]:
        """All other candidates, judged or not, in the order of the row."""
        return tuple(candidate for candidate in self.candidates if candidate.label != 1)
