"""Times the mean loss and its gradients of small batches beside naive, all in one process and in turns.

    python benchmarks/infonce_small.py [threads=2] [seconds=2]

At these sizes a process may be a third slower than the next one of the same code, for where its memory happens to lie;
benchmarks/infonce.py, which gives each implementation a process of its own, cannot tell that from a difference between
them. A virtual machine may also have two cores in one moment and one in the next. So a cell is the best round as a
multiple of naive's (`matmul`, then `cross_entropy`) and the median of the ratios to naive in the same round; a round's
time is the middle one of three calls. `bare` is the library's operator in an autograd function that checks nothing,
knows no option and gives the mean alone. mm thrice, oneDNN thrice: the three products without all else, on operands
that are laid out already. Products at peak: what they would take at the rate that a loop of multiply-adds on registers
has in the same round; the median of these ratios to naive.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable

OPTIONS = {"threads": "2", "seconds": "2"}
SHAPES = [(rows, width) for rows in (16, 64, 128, 256, 512, 1024) for width in (384, 1024)]
TEMPERATURE = 0.05
WORKSPACE = 16 << 20  # bytes, weighted_infonce's default


def main(words: list[str]) -> None:
    """Print a row for each shape."""
    options = OPTIONS | dict(word.partition("=")[::2] for word in words)
    if unknown := sorted(set(options) - set(OPTIONS)):
        print(
            f"There is no option {', '.join(unknown)}; there are {', '.join(OPTIONS)}, as threads=1.", file=sys.stderr
        )
        sys.exit(2)
    os.environ["OMP_NUM_THREADS"] = options["threads"]  # before torch is imported
    columns = "naive, best", "naive rows", "rows", "mean", "bare", "mm thrice", "oneDNN thrice", "products at peak"
    print(f"| B, n, d | {' | '.join(columns)} |\n{'|---' * (1 + len(columns))}|")
    for rows, width in SHAPES:
        times = _times(_steps(rows, width), float(options["seconds"]), int(options["threads"]))
        naive, rates = times.pop("naive"), times.pop("rate")
        cells = [
            f"{min(each) / min(naive):.2f}, {_middle_ratio(each, naive):.2f}" if each else "-"
            for each in times.values()
        ]
        products = [6e-9 * rows * rows * width / rate for rate in rates]
        cells.append(f"{_middle_ratio(products, naive):.2f}" if rates else "-")
        print(f"| {rows}, 0, {width} | {1e3 * min(naive):.3g} ms | {' | '.join(cells)} |", flush=True)


def _steps(rows: int, width: int) -> dict[str, Callable[[], object] | None]:
    import torch
    from torch.nn.functional import cross_entropy, normalize

    from tdro_hpc.losses import grouped_infonce, weighted_infonce

    generator = torch.Generator().manual_seed(0)
    queries, documents = (normalize(torch.randn(rows, width, generator=generator), dim=1) for _ in range(2))
    sides, positives = (queries.requires_grad_(), documents.requires_grad_()), torch.arange(rows)
    weights = torch.full((rows,), 1 / rows)
    keys = {"temperature": TEMPERATURE, "implementation": "fused"}
    losses: dict[str, Callable[[], torch.Tensor]] = {
        "naive": lambda: cross_entropy(queries @ documents.T / TEMPERATURE, positives),
        "naive rows": lambda: cross_entropy(queries @ documents.T / TEMPERATURE, positives, reduction="none").mean(),
        "rows": lambda: grouped_infonce(*sides, positives, **keys).mean(),
        "mean": lambda: weighted_infonce(*sides, positives, row_weights=weights, **keys)[0],
        "bare": lambda: bare.apply(*sides, positives, weights),
    }
    losses["mean"]()  # loads the library
    bare = _bare()
    steps = {name: lambda loss=loss: torch.autograd.grad(loss(), sides) for name, loss in losses.items()}
    return steps | _products(queries.detach(), documents.detach())


def _products(queries, documents) -> dict[str, Callable[[], object] | None]:
    import torch

    shares = queries @ documents.T
    given = (queries, documents), (shares, documents.T.contiguous()), (shares.T.contiguous(), queries.T.contiguous())
    linear = torch.ops.mkldnn._linear_pointwise if torch.backends.mkldnn.is_available() else None
    return {
        "mm": lambda: [torch.mm(left, right.T) for left, right in given],
        "oneDNN": linear and (lambda: [linear(left, right, None, "none", [], "") for left, right in given]),
    }


def _bare() -> type:
    import torch

    operator = torch.ops.tdro_hpc.infonce_plain_weighted.default

    class Bare(torch.autograd.Function):
        @staticmethod
        def forward(ctx, queries, documents, positives, weights):
            total, _, *ctx.gradients = operator(
                queries, documents, positives, weights, TEMPERATURE, WORKSPACE, True, True
            )
            return total

        @staticmethod
        def backward(ctx, upstream):
            gradients, ctx.gradients = ctx.gradients, None
            return *gradients, None, None

    return Bare


def _times(steps: dict[str, Callable[[], object] | None], seconds: float, threads: int) -> dict[str, list[float]]:
    """Seconds of each round by name; under "rate" the GFLOP/s of the machine, none without a C compiler."""
    from infonce_lib.roofline import loop_functions, rate_now

    loop = loop_functions().get("float32")
    times: dict[str, list[float]] = {name: [] for name in [*steps, "rate"]}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or not times["naive"]:
        for name, step in steps.items():
            if step is None:
                continue
            step()
            calls = []
            for _ in range(3):
                began = time.perf_counter()
                step()
                calls.append(time.perf_counter() - began)
            times[name].append(statistics.median(calls))
        if loop is not None:
            times["rate"].append(rate_now(loop, threads))
    return times


def _middle_ratio(times: list[float], naive: list[float]) -> float:
    return statistics.median(mine / its for mine, its in zip(times, naive, strict=True))


if __name__ == "__main__":
    main(sys.argv[1:])
