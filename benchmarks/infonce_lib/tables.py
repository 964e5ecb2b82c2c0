"""The tables of times: which implementations at which shapes, what they are compared with, and the goals."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

from infonce_lib.cases import Case, Shape
from infonce_lib.report import STAR, Report, ratio, ratio_cell, seconds_cell, verdict
from infonce_lib.rounds import Figure, Rounds
from infonce_lib.worker import First, Job

TEMPERATURE = 0.05
FORETOLD_TIMES = 64  # a shape foretells the time of another one with at most so many times its work


@dataclass(frozen=True)
class Goal:
    """A ratio that must not be above a limit."""

    top: str  # label
    bottom: tuple[str, ...]  # labels, of which the fastest counts
    limit: float
    where: Callable[[Shape], bool] = lambda shape: True

    @property
    def name(self) -> str:
        bottom = self.bottom[0] if len(self.bottom) == 1 else f"best {self.bottom[0]}"
        return f"{self.top} / {bottom}"


@dataclass(frozen=True)
class TimeTable:
    """Rows are shapes; cells are multiples of the time of one implementation."""

    title: str
    labels: tuple[str, ...]  # implementations, with " bf16" behind those that get bfloat16 embeddings
    relative_to: str
    shapes: tuple[Shape, ...]
    goals: tuple[Goal, ...]


def shapes_of(rows: tuple[int, ...], negatives: tuple[int, ...], widths: tuple[int, ...]) -> tuple[Shape, ...]:
    """All combinations, those with the least work first, so that the time of the next can be foretold."""
    return tuple(sorted((Shape(*each) for each in product(rows, negatives, widths)), key=lambda shape: shape.flops))


def _large(shape: Shape) -> bool:
    return shape.rows >= 4096


def _small(shape: Shape) -> bool:
    return shape.rows <= 1024


CHUNKED = ("torch chunked", "torch chunked 256")
PEERS = ("naive", *CHUNKED, "checkpoint 256", "ST cached", "ST cached dot 256", "tiled probe")
FLOAT32_GOALS = (
    Goal("mean", ("naive",), 0.40, _large),
    Goal("mean", ("naive",), 0.75, _small),
    Goal("mean", CHUNKED, 0.50, _large),
)
TIME_TABLES = {
    "float32": TimeTable(
        "Time of loss and gradients, float32 embeddings",
        (*PEERS, "torch tiles", "rows", "mean", "rows 256 MB", "mean 256 MB"),
        "naive",
        shapes_of((64, 256, 1024, 4096, 16384), (0, 7), (384, 1024)),
        FLOAT32_GOALS,
    ),
    "small": TimeTable(
        "Time of loss and gradients, small batches, float32 embeddings",
        ("naive", "naive rows", *CHUNKED, "tiled probe", "torch tiles", "rows", "mean"),
        "naive",
        shapes_of((16, 64, 256, 512, 1024), (0, 1), (384, 1024)),
        FLOAT32_GOALS,
    ),
    "bf16": TimeTable(
        "Time with bfloat16 embeddings and float32 scores",
        (
            *("naive", "naive bf16", "torch chunked 256 bf16", "tiled probe bf16"),
            *("mean", "rows bf16", "mean bf16", "rows 256 MB bf16", "mean 256 MB bf16"),
        ),
        "naive",
        shapes_of((1024, 4096, 16384), (0, 7), (384, 1024)),
        (Goal("mean bf16", ("naive",), 0.22, _large),),
    ),
    "options": TimeTable(
        "Time of each option as a multiple of the mean loss",
        ("mean", "rows", "symmetric", "ids", "known", "margin", "column weights", "temperature"),
        "mean",
        (Shape(1024, 7, 384), Shape(4096, 0, 1024), Shape(4096, 7, 384), Shape(4096, 7, 1024)),
        (
            Goal("rows", ("mean",), 1.40),
            Goal("symmetric", ("mean",), 1.40),
            Goal("ids", ("mean",), 1.05),
            Goal("margin", ("mean",), 1.05),
        ),
    ),
    "groups": TimeTable(
        "Time with groups as a multiple of the mean loss without",
        ("mean", "naive", "naive mask", "naive loop", "sorted groups", "mixed groups", "own", "own rows"),
        "mean",
        (Shape(4000, 7, 384), Shape(4000, 7, 1024)),
        (
            Goal("sorted groups", ("mean",), 0.08),
            Goal("mixed groups", ("mean",), 0.08),
            Goal("own", ("mean",), 0.10),
        ),
    ),
}


class Session:
    """Measures implementations at shapes; remembers how fast each was, to leave out what would take too long."""

    def __init__(self, rounds: Rounds) -> None:
        self.rounds, self.options = rounds, rounds.options
        self.raw: list[dict] = []  # every figure, for json=
        self._peaks: dict[str, float] | None = None
        self._newest: dict[str, tuple[int, float]] = {}  # flops and seconds of the newest shape, by label

    def shapes(self, own: tuple[Shape, ...]) -> tuple[Shape, ...]:
        """The table's own shapes, with the numbers of B=, n= and d= in place of its own."""
        options = self.options
        if not (options.B or options.n or options.d):
            return own
        found = (
            options.B or tuple(shape.rows for shape in own),
            options.n or tuple(shape.negatives for shape in own),
            options.d or tuple(shape.width for shape in own),
        )
        return shapes_of(*(tuple(dict.fromkeys(numbers)) for numbers in found))

    def labels(self, own: tuple[str, ...]) -> list[str]:
        """The table's implementations that `only` leaves."""
        only = self.options.only
        return [label for label in own if not only or label.removesuffix(" bf16") in only]

    def measure(self, table: str, shape: Shape, labels: list[str], *, timed: bool = True) -> dict[str, Figure]:
        """Figures by label; those that are left out carry the reason."""
        expected = {label: self._expected_seconds(label, shape) for label in labels}
        wanted = [label for label in labels if expected[label] <= self.options.max_seconds]
        figures = self.rounds.measure([self._job(label, shape, timed) for label in wanted])
        for label, figure in figures.items():
            seconds = figure.seconds if figure.samples else figure.first.seconds
            if seconds and not figure.failed:
                self._newest[label] = shape.flops, seconds
            self.keep(table, str(shape), label, figure)
        left_out = {label: _left_out(expected[label]) for label in labels if label not in figures}
        return figures | left_out

    def _expected_seconds(self, label: str, shape: Shape) -> float:
        """Of one call, by the newest shape; 0 where that had so little work that it says nothing of this one."""
        flops, seconds = self._newest.get(label, (0, 0.0))
        return seconds * shape.flops / flops if flops * FORETOLD_TIMES >= shape.flops else 0.0

    def peak(self, dtype: str) -> float:
        """GFLOP/s of multiply-adds on registers alone, measured once a run; 0 where that is not known."""
        if self._peaks is None:
            arguments = {"widths": (), "threads": self.options.threads, "seconds": self.options.seconds}
            job = Job("rates", "infonce_lib.roofline", "RateWorkload", arguments, timed=False)
            self._peaks = self.rounds.measure([job])["rates"].first.figures
        return self._peaks.get(f"multiply-add loop, {dtype}", 0.0)

    def keep(self, table: str, row: str, label: str, figure: Figure) -> None:
        """Put a figure among those that json= writes."""
        samples = [vars(sample) for sample in figure.samples]
        self.raw.append({"table": table, "row": row, "label": label, **vars(figure.first), "samples": samples})

    def _job(self, label: str, shape: Shape, timed: bool) -> Job:
        name, dtype = label.removesuffix(" bf16"), "bfloat16" if label.endswith(" bf16") else "float32"
        case = Case(shape, dtype, TEMPERATURE, self.options.implementation)
        return Job(label, "infonce_lib.workloads", "LossWorkload", {"name": name, "case": case}, timed)


def _left_out(seconds: float) -> Figure:
    return Figure(First(failed=f"about {seconds:.0f} s"))


def time_table(session: Session, name: str) -> Report:
    """Times of one of TIME_TABLES."""
    table = TIME_TABLES[name]
    labels = session.labels(table.labels)
    goals = [goal for goal in table.goals if goal.top in labels and any(label in labels for label in goal.bottom)]
    shapes = session.shapes(table.shapes)
    goal_names = list(dict.fromkeys(goal.name for goal in goals))
    others = [label for label in labels if label != table.relative_to]
    # Where something is compared with naive, what the products alone would take of its time.
    peak = session.peak("bfloat16" if name == "bf16" else "float32") if table.relative_to == "naive" else 0.0
    floor = ["products at peak"] if peak else []
    goal_columns = [f"goal: {each}" for each in goal_names]
    report = Report(table.title, ["B, n, d", table.relative_to, *others, *floor, *goal_columns])
    highest: dict[str, tuple[float, Shape]] = {}
    for shape in shapes:
        figures = session.measure(name, shape, labels)
        base = figures.get(table.relative_to)
        cells = [seconds_cell(base), *(ratio_cell(figures[label], base) for label in others)]
        if peak:
            known = base is not None and base.samples
            cells.append(f"{1e-9 * shape.flops / peak / base.seconds:.2f}" if known else "-")
        cells += [_goal_cell(report, goals, each, shape, figures) for each in goal_names]
        report.rows.append([str(shape), *cells])
        for label in ("mean", "mean bf16"):
            value = ratio(figures.get(label), figures.get("naive"))
            if value is not None and value >= highest.get(label, (0.0, shape))[0]:
                highest[label] = value, shape
    report.notes += [f"Cells: time as a multiple of {table.relative_to}, whose own time stands first. {STAR}"]
    if peak:
        report.notes.append(
            f"Products at peak: 6 B M d at the {peak:.0f} GFLOP/s of a loop of multiply-adds on registers."
        )
    if table.relative_to == "naive":
        for label, (value, shape) in highest.items():
            said = verdict(report, value, 1.0)
            report.notes.append(
                f"{label} / naive is {value:.2f} at its highest ({shape}); goal: never above 1.00, {said}."
            )
    report.labels += labels
    return report


def _goal_cell(report: Report, goals: list[Goal], name: str, shape: Shape, figures: dict[str, Figure]) -> str:
    """The ratio of the goal that holds at this shape beside its limit."""
    for goal in goals:
        if goal.name != name or not goal.where(shape):
            continue
        there = [figures[label] for label in goal.bottom if label in figures and figures[label].samples]
        value = ratio(figures[goal.top], min(there, key=lambda figure: figure.seconds)) if there else None
        if value is None:
            return "-"
        return f"{value:.2f} <= {goal.limit:.2f} {verdict(report, value, goal.limit)}"
    return "-"
