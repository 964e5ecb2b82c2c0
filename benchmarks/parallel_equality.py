"""What every layout of ranks computes, beside one process: relative differences, in one table.

    python benchmarks/parallel_equality.py [--layouts zero1 pp2_tp2] [--models qwen2] [--variants full lora]
        [--precision float32] [--out table.md]

Each layout trains tiny backbones on the same global batches: three contrastive steps with negatives of all ranks and
two steps of tDRO, under gradient caching, with clipping. Compared are the embeddings before the first step, the row
losses of all steps, the gradient of every parameter, the gradient norms, every parameter after three steps, and alpha
after both tDRO steps. A cell shows the largest of the six differences. Float32 has to stay under 1e-5.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from equality_lib.cases import LAYOUTS, MODELS, VARIANTS
from equality_lib.compare import QUANTITIES, differences

_RANK = Path(__file__).parent / "equality_lib" / "rank.py"
_ALONE = "alone"
LIMIT = 1e-5


def launch(layout: str, precision: str, cases: list[str], out: Path) -> None:
    """Run all ranks of a layout to their end; raises SystemExit with the last words of one that failed."""
    world = LAYOUTS[layout].world if layout in LAYOUTS else 1
    rendezvous = f"file://{tempfile.mktemp(dir=out)}"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    ranks = []
    for rank in range(world):
        words = [str(_RANK), layout, precision, ",".join(cases), str(out), str(rank), rendezvous]
        log = (out / f"{layout}-{rank}.txt").open("w")
        ranks.append(subprocess.Popen([sys.executable, *words], stdout=log, stderr=log, env=environment))
    for rank, process in enumerate(ranks):
        process.wait()
        if not (out / layout / f"done-{rank}").exists():
            for other in ranks:
                other.kill()
            raise SystemExit(f"{layout}, rank {rank}: {(out / f'{layout}-{rank}.txt').read_text()[-3000:]}")


def table_of(measured: dict[str, dict[str, dict[str, float]]], layouts: list[str]) -> list[str]:
    """Lines of a Markdown table: a case a row, a layout a column, the largest difference in a cell."""
    lines = [f"| model | {' | '.join(layouts)} |", f"|---|{'---|' * len(layouts)}"]
    for case in measured[layouts[0]]:
        cells = [f"{max(measured[layout][case].values()):.1e}" for layout in layouts]
        lines.append(f"| {case.replace('/', ' ')} | {' | '.join(cells)} |")
    for quantity in QUANTITIES:
        cells = [f"{max(case[quantity] for case in measured[layout].values()):.1e}" for layout in layouts]
        lines.append(f"| worst: {quantity} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Measure and print; ends with 1 when a float32 difference is above the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="+", choices=list(LAYOUTS), default=list(LAYOUTS))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--out", type=Path, help="also write the table there")
    arguments = parser.parse_args()
    cases = [f"{model}/{variant}" for model in arguments.models for variant in arguments.variants]
    measured: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        launch(_ALONE, arguments.precision, cases, out)
        for layout in arguments.layouts:
            launch(layout, arguments.precision, cases, out)
            measured[layout] = {case: differences(out / layout / case, out / _ALONE / case) for case in cases}
            worst = max(max(case.values()) for case in measured[layout].values())
            print(f"{layout}: {LAYOUTS[layout].world} ranks, {len(cases)} models, at most {worst:.1e}", flush=True)
    lines = table_of(measured, arguments.layouts)
    print("\n".join(["", *lines]))
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    over = [max(case.values()) > LIMIT for layout in measured.values() for case in layout.values()]
    sys.exit(int(arguments.precision == "float32" and any(over)))


if __name__ == "__main__":
    main()
