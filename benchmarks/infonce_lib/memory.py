"""Tables of memory: what a call holds at its peak beyond the gradients that it returns; and how that grows."""

from pathlib import Path

from infonce_lib.cases import Shape
from infonce_lib.report import Report, megabytes, verdict
from infonce_lib.rounds import Figure
from infonce_lib.tables import PEERS, Session, shapes_of

OURS = ("torch tiles", "symmetric", "ids", "own", "rows", "mean")
MEMORY_SHAPES = (
    Shape(1024, 7, 384),
    Shape(1024, 7, 1024),
    Shape(4096, 0, 1024),
    Shape(4096, 7, 384),
    Shape(4096, 7, 1024),
    Shape(16384, 0, 384),
    Shape(16384, 0, 1024),
    Shape(16384, 7, 384),
)
CURVE_SHAPES = shapes_of((1024, 2048, 4096, 8192, 16384, 32768, 65536), (7,), (64,))
CURVE_LABELS = ("naive", "torch chunked 256", "checkpoint 256", "rows", "mean")
FLOOR_BYTES = 16 * 2**20
GROWTH = 2.2  # of all memory when rows and columns double: linear, and what the start of a process varies by


def allowed_bytes(gradients: int) -> int:
    """The goal for what is held beyond the gradients."""
    return max(FLOOR_BYTES, gradients // 4)


def memory_table(session: Session) -> Report:
    """MB beyond the gradients by shape and implementation."""
    labels = session.labels((*PEERS, *OURS, "rows bf16", "mean bf16", "mean 256 MB", "mean 256 MB bf16"))
    report = Report(
        "Peak memory beyond the gradients, MB, float32 embeddings", ["B, n, d", "gradients", "goal", *labels]
    )
    for shape in session.shapes(MEMORY_SHAPES):
        gradients = shape.gradient_bytes("float32")
        figures = session.measure("memory", shape, labels, timed=False)
        cells = [_memory_cell(report, label, figures[label]) for label in labels]
        report.rows.append([str(shape), megabytes(gradients), megabytes(allowed_bytes(gradients)), *cells])
    report.notes += [
        "Peak resident memory of the first call in a process of its own, less what was resident before it and less the",
        "two gradients. Goal: at most 16 MB, or a quarter of the gradients where that is more.",
        "bf16: of gradients half as large.",
    ]
    report.labels += labels
    return report


def _memory_cell(report: Report, label: str, figure: Figure) -> str:
    if figure.failed:
        return figure.failed
    text = megabytes(figure.first.workspace)
    if label in PEERS or label == "torch tiles":
        return text
    return f"{text} {verdict(report, figure.first.workspace, allowed_bytes(figure.first.gradients))}"


def curve_table(session: Session) -> Report:
    """Memory and time as rows and columns double; plots where out= names a folder."""
    labels = session.labels(CURVE_LABELS)
    columns = ["B x M", "gradients MB"]
    columns += [text for label in labels for text in (f"{label} MB", f"{label} time")]
    ours = [label for label in ("mean", "rows") if label in labels]
    report = Report("Memory and time as the batch grows", [*columns, *(f"{label}: MB when doubled" for label in ours)])
    found: dict[str, list[tuple[Shape, Figure]]] = {label: [] for label in labels}
    shapes = session.shapes(CURVE_SHAPES)
    for shape in shapes:
        figures = session.measure("curve", shape, labels, timed=False)
        cells = [str(shape.rows) + " x " + str(shape.columns), megabytes(shape.gradient_bytes("float32"))]
        for label in labels:
            figure = figures[label]
            cells += [_total_cell(figure), figure.failed or _first_time(figure)]
        cells += [_growth_cell(report, found[label], figures[label], shape) for label in ours]
        for label in labels:
            if not figures[label].failed:
                found[label].append((shape, figures[label]))
        report.rows.append(cells)
    width = shapes[0].width if shapes else 0
    report.notes += [
        f"Width {width}. MB: peak of one call, gradients included; time: of that first call. Goal: when rows and",
        f"columns double, memory grows by at most {GROWTH}; the score matrix grows by 4.",
    ]
    if session.options.out is None:
        report.notes.append("Plots: type out=FOLDER.")
    else:
        written = plot_curves(found, session.options.out)
        report.notes.append("Plots: " + ", ".join(path.name for path in written))
    report.labels += labels
    return report


def _total_bytes(figure: Figure) -> int:
    return figure.first.workspace + figure.first.gradients


def _total_cell(figure: Figure) -> str:
    return "-" if figure.failed else megabytes(_total_bytes(figure))


def _first_time(figure: Figure) -> str:
    return f"{figure.first.seconds:.3g} s"


def _growth_cell(report: Report, before: list[tuple[Shape, Figure]], figure: Figure, shape: Shape) -> str:
    """Factor of the memory against the shape with half the rows, where there is one."""
    half = next((other for other_shape, other in before if 2 * other_shape.rows == shape.rows), None)
    if figure.failed or half is None:
        return "-"
    growth = _total_bytes(figure) / _total_bytes(half)
    return f"{growth:.2f} <= {GROWTH:.2f} {verdict(report, growth, GROWTH)}"


def plot_curves(found: dict[str, list[tuple[Shape, Figure]]], folder: Path) -> list[Path]:
    """infonce_memory.png and infonce_time.png in the folder: one line an implementation, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    axes_of = {
        "infonce_memory.png": ("peak memory of loss and gradients, MiB", lambda figure: _total_bytes(figure) / 2**20),
        "infonce_time.png": ("time of loss and gradients, s", lambda figure: figure.first.seconds),
    }
    for name, (title, value_of) in axes_of.items():
        figure, axes = pyplot.subplots(figsize=(6.4, 4.2), layout="constrained")
        for label, points in found.items():
            xs, ys = [shape.rows for shape, _ in points], [value_of(seen) for _, seen in points]
            axes.plot(xs, ys, marker="o", label=label)
        shapes = sorted({shape for points in found.values() for shape, _ in points}, key=lambda shape: shape.rows)
        if name == "infonce_memory.png":
            gradients = [shape.gradient_bytes("float32") / 2**20 for shape in shapes]
            axes.plot([shape.rows for shape in shapes], gradients, "k:", label="the two gradients")
        axes.set(xscale="log", yscale="log", xlabel="rows B", ylabel=title)
        axes.grid(which="both", alpha=0.3)
        axes.legend()
        figure.savefig(folder / name, dpi=150)
        pyplot.close(figure)
        written.append(folder / name)
    return written
