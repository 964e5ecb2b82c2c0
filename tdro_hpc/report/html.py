"""A run directory in; report.html out: one page that loads nothing from outside and can be sent by mail."""

import html
import json
from pathlib import Path
from typing import Any

from tdro_hpc.atomic import write_text
from tdro_hpc.evaluation.tables import legend, table_cells
from tdro_hpc.launch.record import StageState, read_state
from tdro_hpc.report.plots import stage_figures, svg_uri
from tdro_hpc.training.metrics import duration_of

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 1080px; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.2rem; border-bottom: 1px solid #ddd; } .quiet { color: #666; }
table { border-collapse: collapse; margin: 0.8rem 0; } th, td { padding: 0.2rem 0.8rem 0.2rem 0; text-align: left; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
tr { border-bottom: 1px solid #eee; } tr.last td { font-weight: 600; }
figure { margin: 1rem 0; } figure img { max-width: 100%; } figcaption { color: #666; }
pre { background: #f6f6f6; padding: 0.8rem; overflow-x: auto; }
.done { color: #19692c; } .failed { color: #a4161a; } .running { color: #155fa0; } .stopped { color: #8a5a00; }
"""
CAPTIONS = {
    "loss": "Mean loss of each logging interval.",
    "throughput": "Queries a second of each logging interval.",
    "alpha": "Task weights over steps. The grey line is uniform; names stand in the order of the last weights.",
    "alpha_and_share": "Last weight of each task beside the task's share of all rows.",
    "task_loss": "Loss of the proxy and of the frozen reference on each task.",
}
# The page opens with what the run is about: the weights, then the scores, then how the training went.
_WEIGHT_FIGURES = ("alpha", "alpha_and_share", "task_loss")
_TRAINING_FIGURES = ("loss", "throughput")


def write_report(run_dir: Path) -> Path:
    """Write <run_dir>/report.html from what the stages left so far; returns its path."""
    stage_dirs = sorted(
        (path for path in run_dir.iterdir() if (path / "config.yaml").is_file()),
        key=lambda path: (path / "config.yaml").stat().st_mtime_ns,
    )
    states = {path.name: read_state(path) for path in stage_dirs}
    figures = {path.name: {name: svg_uri(f) for name, f in stage_figures(path).items()} for path in stage_dirs}
    parts = [
        f"<h1>{_text(run_dir.name)}</h1>",
        _stage_section(states),
        _weight_section(run_dir, figures),
        _score_section(run_dir),
        _training_section(figures),
        _config_section(stage_dirs),
    ]
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{_text(run_dir.name)}</title>\n"
        # An icon that is no file: a browser would otherwise ask for favicon.ico.
        f'<link rel="icon" href="data:,">\n<style>{_STYLE}</style>\n</head>\n<body>\n'
        + "\n".join(part for part in parts if part)
        + "\n</body>\n</html>\n"
    )
    path = run_dir / "report.html"
    write_text(path, page)
    return path


def _stage_section(states: dict[str, StageState]) -> str:
    rows = [["stage", "state", "attempts", "step", "wall time", "code"]]
    for name, state in states.items():
        step = f"{state.step}/{state.steps}" if state.steps else ""
        words = f'<span class="{state.status}">{state.status}</span>'
        problem = f' <span class="quiet">{_text(state.problem)}</span>' if state.problem else ""
        cells = [_text(name), words + problem, str(state.attempt), step, duration_of(state.seconds), _text(state.code)]
        rows.append(cells)
    return "<h2>Stages</h2>\n" + _table(rows, numbers=(2, 3, 4), safe=True)


def _weight_section(run_dir: Path, figures: dict[str, dict[str, str]]) -> str:
    pictures = _pictures(figures.get("s1", {}), "s1", _WEIGHT_FIGURES)
    summary = run_dir / "s1" / "out" / "summary.txt"
    words = f"<pre>{_text(summary.read_text(encoding='utf-8'))}</pre>" if summary.is_file() else ""
    return f"<h2>Task weights (s1)</h2>\n{words}\n{pictures}" if pictures or words else ""


def _score_section(run_dir: Path) -> str:
    path = run_dir / "eval" / "out" / "scores" / "scores.json"
    if not path.is_file():
        return ""
    scores: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    tables = []
    for metric in scores["metrics"]:
        cells = table_cells(scores, metric)
        tables.append(_table(cells, numbers=range(1, len(cells[0])), last=len(scores["sets"]) > 1))
    notes = "<br>\n".join(_text(line) for line in legend(scores))
    return "<h2>Evaluation</h2>\n" + "\n".join(tables) + f'\n<p class="quiet">{notes}</p>'


def _training_section(figures: dict[str, dict[str, str]]) -> str:
    parts = []
    for stage, uris in figures.items():
        pictures = _pictures(uris, stage, _TRAINING_FIGURES)
        if pictures:
            parts.append(f"<h3>{_text(stage)}</h3>\n{pictures}")
    return "<h2>Training</h2>\n" + "\n".join(parts) if parts else ""


def _config_section(stage_dirs: list[Path]) -> str:
    if not stage_dirs:
        return ""
    newest = stage_dirs[-1]
    text = (newest / "config.yaml").read_text(encoding="utf-8")
    return (
        f"<h2>Config</h2>\n<details><summary>resolved config of {_text(newest.name)}</summary>\n"
        f"<pre>{_text(text)}</pre></details>"
    )


def _pictures(uris: dict[str, str], stage: str, names: tuple[str, ...]) -> str:
    return "\n".join(
        f'<figure><img src="{uris[name]}" alt="{_text(stage)}: {_text(CAPTIONS[name])}">'
        f"<figcaption>{_text(CAPTIONS[name])}</figcaption></figure>"
        for name in names
        if name in uris
    )


def _table(rows: list[list[str]], *, numbers: Any = (), last: bool = False, safe: bool = False) -> str:
    """An HTML table; the first row is the head. `numbers` = columns set right; `safe` = cells are HTML already."""
    lines = ["<table>"]
    for number, row in enumerate(rows):
        tag = "th" if number == 0 else "td"
        marked = ' class="last"' if last and number == len(rows) - 1 else ""
        cells = [
            f"<{tag}{' class=' + chr(34) + 'number' + chr(34) if column in numbers else ''}>"
            f"{cell if safe else _text(cell)}</{tag}>"
            for column, cell in enumerate(row)
        ]
        lines.append(f"<tr{marked}>{''.join(cells)}</tr>")
    return "\n".join([*lines, "</table>"])


def _text(value: str) -> str:
    return html.escape(value, quote=True)
