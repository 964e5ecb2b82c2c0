"""The report in a real browser: it renders, its pictures load, and it asks for nothing outside itself."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest

from tdro_hpc.report.html import write_report
from tdro_hpc.report.plots import smoothed, write_plots

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
TASKS = [f"task_{number:02d}" for number in range(25)]
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def write_stage(stage: Path, *, weights: bool) -> None:
    stage.mkdir(parents=True)
    (stage / "config.yaml").write_text(f"name: run\nseed: 42 # <{stage.name}>\n")
    rows, trajectory = [], []
    for step in range(1, 41):
        alpha = {task: math.exp(0.02 * step * math.sin(number)) for number, task in enumerate(TASKS)}
        alpha = {task: value / sum(alpha.values()) for task, value in alpha.items()}
        trajectory.append({"step": step, "alpha": alpha, "measurement": alpha})
        if step % 4 == 0:
            losses = {task: 2 / step + 0.01 * number for number, task in enumerate(TASKS)}
            row = {"stage": stage.name, "step": step, "steps": 40, "loss": 2 / step, "grad_norm": 1.0}
            row |= {"learning_rate": 1e-4, "task_loss": losses, "clock": {"queries_per_second": 30.0 + step}}
            if weights:
                row |= {"task_reference_loss": losses, "alpha": alpha}
            rows.append(row)
    (stage / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if weights:
        (stage / "trajectory.jsonl").write_text("".join(json.dumps(row) + "\n" for row in trajectory))
        (stage / "out" / "weights").mkdir(parents=True)
        (stage / "out" / "weights" / "curr_weights.json").write_text(json.dumps({"size": dict.fromkeys(TASKS, 100)}))
        (stage / "out" / "summary.txt").write_text("What the weights say <here>\n")


def write_scores(run_dir: Path) -> None:
    means = {"ndcg@10": 0.5, "recall@100": 0.75, "mrr@10": 0.4}
    models = ["base", "s0", "s2-curr"]
    section = {"scores": dict.fromkeys(models, means), "p": {"s2-curr": dict.fromkeys(means, 0.004)}}
    sets = {name: {"queries": 50, "documents": 300, "notes": [], **section} for name in ("codes", "words")}
    scores = {"metrics": list(means), "models": models, "baseline": "s0", "test": "a test", "sets": sets}
    folder = run_dir / "eval" / "out" / "scores"
    folder.mkdir(parents=True)
    (run_dir / "eval" / "config.yaml").write_text("name: run\n")
    (folder / "scores.json").write_text(json.dumps(scores | {"average": section}))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run & co"
    write_stage(folder / "s0", weights=False)
    write_stage(folder / "s1", weights=True)
    write_scores(folder)
    return folder


def test_page_renders_without_errors_and_loads_nothing_from_outside(run_dir: Path, tmp_path: Path):
    if BROWSER is None:
        assert not os.environ.get("CI"), "CI must have a browser: apt-get install chromium"
        pytest.skip("no browser on this machine: apt install chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    page_file = write_report(run_dir)
    requests, errors = [], []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=QUIET)
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(page_file.as_uri())
        widths = page.evaluate("[...document.images].map(image => image.naturalWidth)")
        sideways = page.evaluate("document.documentElement.scrollWidth > window.innerWidth")
        text = page.inner_text("body")
        browser.close()
    assert errors == []
    assert len(widths) == 7 and min(widths) > 100  # alpha, share, task losses of s1; loss and throughput of s0 and s1
    assert [url for url in requests if not url.startswith(("data:", page_file.as_uri()))] == []
    assert not sideways, "the page scrolls sideways"
    for words in ("Stages", "Task weights", "Evaluation", "0.5000**", "What the weights say <here>", "run & co"):
        assert words in text


def test_alpha_plot_names_all_25_tasks_apart(run_dir: Path):
    from tdro_hpc.report.plots import stage_figures

    figure = stage_figures(run_dir / "s1")["alpha"]
    axes = figure.axes[0]
    looks = {(line.get_color(), line.get_linestyle()) for line in axes.get_lines()[:25]}
    assert len(looks) == 25
    labels = [entry.get_text() for entry in axes.get_legend().get_texts()]
    assert sorted(label.split()[1] for label in labels) == TASKS
    assert [float(label.split()[0]) for label in labels] == sorted((float(x.split()[0]) for x in labels), reverse=True)


def test_plots_are_png_files(run_dir: Path):
    names = sorted(path.name for path in write_plots(run_dir / "s1"))
    assert names == ["alpha.png", "alpha_and_share.png", "loss.png", "task_loss.png", "throughput.png"]
    assert all((run_dir / "s1" / "plots" / name).read_bytes().startswith(b"\x89PNG") for name in names)


def test_report_of_a_run_that_has_only_begun(tmp_path: Path):
    (tmp_path / "s0").mkdir()
    (tmp_path / "s0" / "config.yaml").write_text("name: x\n")
    assert "Evaluation" not in write_report(tmp_path).read_text()


def test_same_files_give_the_same_page(run_dir: Path):
    first = write_report(run_dir).read_bytes()
    assert write_report(run_dir).read_bytes() == first


def test_smoothing_is_a_trailing_mean():
    assert smoothed([1.0, 3.0, 5.0], window=2) == [1.0, 2.0, 4.0]
