"""Pictures of a stage and the report of a run, drawn from their files. A failure to draw is said and costs nothing."""

import importlib
import sys
import traceback
from pathlib import Path


def draw_plots(stage_dir: Path) -> None:
    """Draw the pictures of one stage."""
    _draw("plots", "tdro_hpc.report.plots", "write_plots", stage_dir)


def draw_report(run_dir: Path) -> None:
    """Write report.html anew from what the stages left so far."""
    _draw("report", "tdro_hpc.report.html", "write_report", run_dir)


def _draw(what: str, module: str, function: str, folder: Path) -> None:
    try:
        # By name: drawing takes a second to import, and reads the records that are written here.
        getattr(importlib.import_module(module), function)(folder)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{last.filename}:{last.lineno}"
        print(f"The {what} of {folder} could not be made: {type(error).__name__}: {error} ({where})", file=sys.stderr)
