"""Prints what the loss costs on a GPU beside naive torch and torch's chunked loss: rate, memory, precision.

    python benchmarks/infonce_gpu.py [rows=8192] [columns=32768,131072] [width=1024,4096] [rounds=7]

Forward and backward of the mean loss in bfloat16, each timed in turns with the others after one call that counts for
memory only. TFLOP/s are those of the three products that nobody can do without, 6 x rows x columns x width, whatever an
implementation really does. Workspace is the peak of allocated memory beyond inputs and the two gradients. The error of
the gradients at T = 0.002 is against float64 on the same bfloat16 values, with documents that are much alike.
Exits with 2 where there is no CUDA device.
"""

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from tdro_hpc.losses import grouped_infonce, weighted_infonce

TEMPERATURE = 0.02
COLD = 0.002
REFERENCE_ROWS = 256  # rows of float64 scores at a time


@dataclass(frozen=True)
class Inputs:
    """bfloat16 embeddings that require gradients, and the columns of the positives."""

    queries: Tensor
    documents: Tensor
    positives: Tensor


def build_inputs(rows: int, columns: int, width: int) -> Inputs:
    """Each row has a subject; documents are near the subject of a row, the first ones of each are the positives."""
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(count: int) -> Tensor:
        return torch.randn(count, width, device="cuda", generator=generator) / width**0.5

    subjects = functional.normalize(0.7 * draw(1) + draw(rows))
    owners = torch.arange(columns, device="cuda") % rows
    documents = functional.normalize(subjects.index_select(0, owners) + 0.1 * draw(columns))
    queries = functional.normalize(subjects + 0.3 * draw(rows))
    sides = [side.bfloat16().requires_grad_() for side in (queries, documents)]
    return Inputs(*sides, torch.arange(rows, device="cuda"))


def mean_by_weights(inputs: Inputs, temperature: float) -> None:
    """This project, gradient formed in the forward."""
    rows = len(inputs.queries)
    weights = torch.full((rows,), 1 / rows, device="cuda")
    total, _ = weighted_infonce(
        inputs.queries, inputs.documents, inputs.positives, row_weights=weights, temperature=temperature,
        implementation="fused",
    )  # fmt: skip
    total.backward()


def losses_of_rows(inputs: Inputs, temperature: float) -> None:
    """This project, a loss for each row first."""
    losses = grouped_infonce(
        inputs.queries, inputs.documents, inputs.positives, temperature=temperature, implementation="fused"
    )
    losses.mean().backward()


def naive(inputs: Inputs, temperature: float) -> None:
    """All scores in bfloat16, as in most training code."""
    scores = inputs.queries @ inputs.documents.T / temperature
    functional.cross_entropy(scores, inputs.positives).backward()


def torch_chunked(inputs: Inputs, temperature: float) -> None:
    """torch's linear_cross_entropy, which cuts the rows itself."""
    scaled, options = inputs.queries / temperature, torch.nn.LinearCrossEntropyOptions()
    functional.linear_cross_entropy(scaled, inputs.documents, inputs.positives, options=options).backward()


IMPLEMENTATIONS: dict[str, Callable[[Inputs, float], None]] = {
    "weighted_infonce": mean_by_weights,
    "grouped_infonce": losses_of_rows,
    "naive bf16": naive,
    "torch chunked": torch_chunked,
}


def gradients_of(function: Callable[[Inputs, float], None], inputs: Inputs, temperature: float) -> tuple[Tensor, ...]:
    """Those of queries and documents, handed over."""
    function(inputs, temperature)
    found = inputs.queries.grad, inputs.documents.grad
    inputs.queries.grad = inputs.documents.grad = None
    assert found[0] is not None and found[1] is not None, "both sides require gradients"
    return found[0], found[1]


def milliseconds(function: Callable[[Inputs, float], None], inputs: Inputs) -> float:
    """Time of one forward and backward on the device."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    gradients_of(function, inputs, TEMPERATURE)
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


def workspace_bytes(function: Callable[[Inputs, float], None], inputs: Inputs) -> int:
    """Peak beyond inputs and gradients."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradients = gradients_of(function, inputs, TEMPERATURE)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - sum(gradient.nbytes for gradient in gradients)


def exact_gradients(inputs: Inputs, temperature: float) -> tuple[Tensor, Tensor]:
    """In float64, some rows at a time."""
    queries, documents = inputs.queries.detach().double(), inputs.documents.detach().double()
    of_queries, of_documents = torch.empty_like(queries), torch.zeros_like(documents)
    for first in range(0, len(queries), REFERENCE_ROWS):
        rows = slice(first, first + REFERENCE_ROWS)
        shares = torch.softmax(queries[rows] @ documents.T / temperature, dim=1)
        shares[torch.arange(len(shares)), inputs.positives[rows]] -= 1
        shares /= temperature * len(queries)
        of_queries[rows] = shares @ documents
        of_documents += shares.T @ queries[rows]
    return of_queries, of_documents


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def table(rows: int, columns: int, width: int, rounds: int) -> str:
    """Lines of one shape, one for each implementation; a failing one says why."""
    inputs = build_inputs(rows, columns, width)
    exact = exact_gradients(inputs, COLD)
    figures: dict[str, tuple[int, list[float]]] = {}
    failed: dict[str, str] = {}
    for name, function in IMPLEMENTATIONS.items():
        try:
            gradients_of(function, inputs, TEMPERATURE)  # compiles, and gives cuBLAS its workspace
            workspace = workspace_bytes(function, inputs)
            errors = map(relative_error, gradients_of(function, inputs, COLD), exact)
            figures[name] = workspace, [*errors]
        except (RuntimeError, AttributeError) as error:  # out of memory, or a torch that has no such loss
            failed[name] = str(error).splitlines()[0]
    times: dict[str, list[float]] = {name: [] for name in figures}
    for _ in range(rounds):
        for name in figures:
            times[name].append(milliseconds(IMPLEMENTATIONS[name], inputs))
    lines = [f"rows={rows} columns={columns} width={width}"]
    for name, (workspace, errors) in figures.items():
        middle = statistics.median(times[name])
        rate = 6 * rows * columns * width / middle / 1e9
        lines.append(
            f"  {name:18} {middle:9.2f} ms  {rate:6.0f} TFLOP/s  {workspace / 2**20:8.0f} MiB  "
            f"error {errors[0]:.1e} {errors[1]:.1e}"
        )
    return "\n".join(lines + [f"  {name:18} failed: {words}" for name, words in failed.items()])


def parse(words: list[str]) -> dict[str, list[int]]:
    """The options of the first lines; raises ValueError for one that is unknown or no whole number."""
    options = {"rows": [8192], "columns": [32768, 131072], "width": [1024, 4096], "rounds": [7]}
    for word in words:
        key, _, value = word.partition("=")
        if key not in options:
            raise ValueError(f"{word} is not known; the options are {', '.join(f'{name}=' for name in options)}.")
        try:
            options[key] = [int(number) for number in value.split(",")]
        except ValueError:
            raise ValueError(f"{word} is no list of whole numbers; type something like {key}=1024,4096.") from None
    return options


def main(words: list[str]) -> int:
    """Print one table for each shape; returns the exit status."""
    options = parse(words)
    if not torch.cuda.is_available():
        print("infonce_gpu.py needs a CUDA device, and torch sees none here. benchmarks/infonce.py measures on CPUs.")
        return 2
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bfloat16, median of {options['rounds'][0]}")
    for rows in options["rows"]:
        for columns in options["columns"]:
            for width in options["width"]:
                print(table(rows, columns, width, options["rounds"][0]), flush=True)
                torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ValueError as error:
        sys.exit(str(error))
