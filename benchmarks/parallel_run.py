"""The same run under three layouts: s0, s1, s2 and eval of the embedded data, with the same global batches.

    python benchmarks/parallel_run.py [--layouts ddp zero1 pp2_tp2] [--steps 16] [--folder runs/layouts]
        [more key=value words]

Every layout goes through the front door (`python -m tdro_hpc.submit cluster=local`) with a tiny decoder in float32.
Printed are each task's weight after s1 and the mean nDCG@10 of each model, a layout a column, and the largest
difference from the first layout. The same line again continues what was stopped and prints what is done.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

GLOBAL_ROWS = {"s0": 32, "s1": 24, "s2": 32}  # two rows a step of each of the twelve tasks in s1
RANKS = {"ddp": 2, "zero1": 2, "zero2": 2, "zero3": 2, "tp2": 2, "pp2": 2, "pp2_tp2": 4}
DATA_RANKS = {"ddp": 2, "zero1": 2, "zero2": 2, "zero3": 2, "tp2": 1, "pp2": 1, "pp2_tp2": 1}
SMALL = {"max_rows_per_task": 200, "test_queries": 60, "test_documents": 200}


def words_of(layout: str, arguments: argparse.Namespace) -> list[str]:
    """Keys of one run."""
    words = ["stage=all", "config=demo", "cluster=local", "model=tiny_decoder", f"parallel={layout}", f"name={layout}"]
    words += [f"runs_dir={arguments.folder}", f"cluster.ranks_per_node={RANKS[layout]}", "logging.plots=false"]
    words += ["model.autocast=float32", "model.lora.dropout=0", "s2.weights=curr"]
    words += [f"embedded.{key}={value}" for key, value in SMALL.items()]
    words += ["eval.query_max_tokens=256"]  # a token a byte: the instruction alone is longer than the demo's 64
    for stage, rows in GLOBAL_ROWS.items():
        words += [f"{stage}.steps={arguments.steps}", f"{stage}.queries_per_rank={rows // DATA_RANKS[layout]}"]
        # At the demo's rate all vectors of a random decoder would become one.
        words += [f"{stage}.learning_rate=2e-5", f"{stage}.warmup_steps=2", f"{stage}.temperature=0.1"]
    return words + arguments.words


def results_of(folder: Path) -> dict[str, float]:
    """alpha of every task, and nDCG@10 of every model, of a finished run."""
    weights = json.loads((folder / "s1" / "out" / "weights" / "curr_weights.json").read_text())["domain_weights"]
    scores = json.loads((folder / "eval" / "out" / "scores" / "scores.json").read_text())
    sets = [table["scores"] for table in scores["sets"].values()]
    means = {model: sum(of_models[model]["nDCG@10"] for of_models in sets) / len(sets) for model in scores["models"]}
    alphas = {f"alpha of {task}": value for task, value in weights.items()}
    return alphas | {f"nDCG@10 of {model}": value for model, value in means.items()}


def main() -> None:
    """Run the layouts one after the other and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="+", choices=list(RANKS), default=["ddp", "zero1", "pp2_tp2"])
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--folder", type=Path, default=Path("runs/layouts"))
    parser.add_argument("words", nargs="*", help="more keys of all runs, as submit takes them")
    arguments = parser.parse_args()
    columns = {}
    for layout in arguments.layouts:
        subprocess.run([sys.executable, "-m", "tdro_hpc.submit", *words_of(layout, arguments)], check=True)
        columns[layout] = results_of(arguments.folder / layout)
    first = columns[arguments.layouts[0]]
    print(f"\n| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for name in first:
        print(f"| {name} | {' | '.join(f'{column[name]:.6f}' for column in columns.values())} |")
    for layout, column in columns.items():
        alpha, score = (
            max(abs(column[name] - first[name]) for name in first if name.startswith(kind))
            for kind in ("alpha", "nDCG")
        )
        print(f"{layout}: alpha within {alpha:.1e}, nDCG@10 within {score:.1e} of {arguments.layouts[0]}")


if __name__ == "__main__":
    main()
