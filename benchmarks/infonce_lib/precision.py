"""How far loss and gradients are from float64 as the temperature falls, at cosines near 1."""

from infonce_lib.cases import Case, Shape, build_close_inputs
from infonce_lib.implementations import IMPLEMENTATIONS
from infonce_lib.report import Report
from infonce_lib.tables import Session
from infonce_lib.worker import Job
from infonce_lib.workloads import ERRORS, errors_of

TEMPERATURES = (0.05, 0.02, 0.01, 0.002)
LABELS = ("naive bf16", "naive", "mean bf16", "rows bf16", "mean", "rows")
SHAPE = Shape(512, 7, 1024)


class PrecisionWorkload:
    """Errors of one implementation at each temperature; nothing is timed."""

    gradient_bytes = 0

    def __init__(self, name: str, shape: Shape, dtype: str, implementation: str) -> None:
        self.name = name
        self.cases = [Case(shape, dtype, temperature, implementation) for temperature in TEMPERATURES]

    def check(self) -> dict[str, float]:
        """Relative errors against float64 on the same inputs, rounded to bfloat16 first where that is the type."""
        return {
            f"{error} at {case.temperature}": value
            for case in self.cases
            for error, value in errors_of(IMPLEMENTATIONS[self.name], build_close_inputs(case)).items()
        }

    def run(self) -> None:
        """Nothing: the errors are all that is asked for."""


def precision_table(session: Session) -> Report:
    """One row an implementation and temperature."""
    labels = session.labels(LABELS)
    shape = session.shapes((SHAPE,))[0]
    columns = ["implementation", "relative error of", *(f"T = {temperature}" for temperature in TEMPERATURES)]
    report = Report("Distance to float64 on the same inputs, cosines near 1", columns)
    figures = session.rounds.measure([_job(label, shape, session.options.implementation) for label in labels])
    for label, figure in figures.items():
        session.keep("precision", str(shape), label, figure)
        for error in ERRORS:
            names = [f"{error} at {temperature}" for temperature in TEMPERATURES]
            cells = [figure.failed or f"{figure.first.figures[name]:.1e}" for name in names]
            report.rows.append([label, error.removesuffix(" error"), *cells])
    report.notes += [
        f"B, n, d = {shape}. Unit vectors that share a direction: cosines with a query are about 0.97 for its",
        "positive, 0.96 for its own negatives and 0.87 for other columns. Gradients: norm of the difference over the",
        "norm of the gradient in float64. bf16: bfloat16 embeddings; float64 reference of the same rounded embeddings.",
    ]
    report.labels += labels
    return report


def _job(label: str, shape: Shape, implementation: str) -> Job:
    name, dtype = label.removesuffix(" bf16"), "bfloat16" if label.endswith(" bf16") else "float32"
    arguments = {"name": name, "shape": shape, "dtype": dtype, "implementation": implementation}
    return Job(label, "infonce_lib.precision", "PrecisionWorkload", arguments, timed=False)
