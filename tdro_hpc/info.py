"""What this machine brings: torch, the compiled loss and why it is used or not, optional packages; and is it right?

    python -m tdro_hpc.info

A small random loss is compared with a dense one in float64, with its gradients, for each device and type: row by row
and as a sum, each with memory to spare and without, and symmetric. Exit codes: 0 = right, 1 = wrong, 2 = a mistake in
the call.
"""

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tdro_hpc
from tdro_hpc.losses import fused, grouped_infonce, weighted_infonce
from tdro_hpc.losses.library import load

TEMPERATURE = 0.05
# Largest error of the losses, and of the gradients, relative to the largest of them. Losses: float32 sums of a hundred
# products. Gradients of bfloat16 and float16 embeddings are such numbers, which have eight and eleven binary digits.
LIMITS = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (1e-4, 1e-2), torch.float16: (1e-4, 2e-3)}
WORKSPACES_MB = 16, 0  # the usual; none: gradients of half precision are formed in parts, and nothing is kept
PACKAGES = {"flash_attn": "flash-attn", "apex": "apex", "deepspeed": "deepspeed", "faiss": "faiss"}


@dataclass(frozen=True)
class Problem:
    """A batch of every kind of row: with many negatives and with none, with a double of its positive."""

    queries: Tensor  # [rows, width], unit length
    documents: Tensor  # [columns, width], unit length
    positives: Tensor  # [rows]
    row_weights: Tensor  # [rows]
    query_group: Tensor | None  # [rows]
    document_group: Tensor | None  # [columns]
    document_ids: Tensor | None  # [columns]

    def without_options(self) -> "Problem":
        """The same without groups and ids: calls of the loss that have none go another way."""
        return replace(self, query_group=None, document_group=None, document_ids=None)


def main(words: list[str]) -> int:
    """Print everything; the exit code."""
    if words:
        print(f"tdro_hpc.info takes no words, and was given {' '.join(words)}.", file=sys.stderr)
        return 2
    lines = [*machine_lines(), *package_lines()]
    width = max(len(name) for name, _ in lines) + 2
    for name, text in lines:
        print(f"{name:{width}}{text}")
    right = [check_loss(device) for device in ("cpu", "cuda") if device == "cpu" or torch.cuda.is_available()]
    return 0 if all(right) else 1


def machine_lines() -> Iterator[tuple[str, str]]:
    """What is named, and what is said of it: this package, torch, the GPU, the compiled library."""
    yield "tdro_hpc", f"{tdro_hpc.__version__} in {Path(tdro_hpc.__file__).parent}"
    yield "torch", f"{torch.__version__}, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        yield "GPU", f"{torch.cuda.get_device_name()} (sm_{major}{minor}), CUDA {torch.version.cuda}"
    else:
        yield "GPU", "none that torch can use"
    library = load()
    if library.path is None:
        yield "compiled loss", f"none: {library.reason}"
        return
    yield "compiled loss", f"{library.path}{_outdated(library.path)}"
    yield "", f"on this CPU by its {torch.ops.tdro_hpc.infonce_cpu_path()} code"
    yield "", "built with CUDA" if library.cuda else "built for CPUs only"


def _outdated(library: Path) -> str:
    files = (Path(tdro_hpc.__file__).parents[1] / "kernels").rglob("*")
    sources = [path for path in files if path.suffix in (".cpp", ".cu", ".h")]
    newer = [path.name for path in sources if path.stat().st_mtime > library.stat().st_mtime]
    return f", older than {newer[0]}: type `make build`" if newer else ""


def package_lines() -> Iterator[tuple[str, str]]:
    """Optional packages and their versions."""
    distributions = packages_distributions()
    for module, name in PACKAGES.items():
        spec = importlib.util.find_spec(module)
        if spec is None:
            yield name, "not installed"
            continue
        found = ", ".join(f"{owner} {version(owner)}" for owner in sorted(set(distributions.get(module, []))))
        folders = map(Path, spec.submodule_search_locations or [])
        if module == "apex" and not any((folder / "optimizers").is_dir() for folder in folders):
            found += ", which is not NVIDIA's apex"  # another project has the name on the package index
        yield name, found or "installed, of an unknown version"


def check_loss(device: str) -> bool:
    """Print how the loss is computed on a device and how exact it is; whether it is right for each type."""
    obstacle = fused.obstacle(torch.float32, device)
    print(f"\nloss on {device}: " + (f"in plain torch, because {obstacle}" if obstacle else "compiled"))
    all_right = True
    for dtype, limits in LIMITS.items():
        errors = errors_of_loss(random_problem(device, dtype))
        is_right = all(error <= limit for error, limit in zip(errors, limits, strict=True))  # NaN is not
        all_right &= is_right
        off = [f"{error:.0e} (limit {limit:.0e})" for error, limit in zip(errors, limits, strict=True)]
        name = str(dtype).removeprefix("torch.")
        print(f"  {name:9} {'right' if is_right else 'WRONG'}: losses off by {off[0]}, gradients by {off[1]}")
    if not all_right:
        print(f"The loss on {device} is WRONG: do not train with it.", file=sys.stderr)
    return all_right


def errors_of_loss(problem: Problem) -> tuple[float, float]:
    """Largest error of the losses and of the gradients, by each way there is, relative to the largest of them."""
    ways, errors = [], []
    for each in (problem, problem.without_options()):
        wanted = dense_loss(each)
        ways += [(way(each, megabytes), wanted) for megabytes in WORKSPACES_MB for way in (by_rows, by_sum)]
    for found, exact in (*ways, (by_both_sides(problem), dense_loss(problem, symmetric=True))):
        errors.append([_error(mine, theirs) for mine, theirs in zip(found, exact, strict=True)])
    of_losses, *of_gradients = torch.tensor(errors).amax(dim=0).tolist()  # NaN is the largest
    return of_losses, torch.tensor(of_gradients).amax().item()


def _error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).abs().max() / wanted.abs().max())


def random_problem(device: str, dtype: torch.dtype) -> Problem:
    """The same problem at each call, rounded to a type: sizes that divide by nothing a kernel cuts them into."""
    rows, columns, width, groups = 307, 613, 101, 5
    generator = torch.Generator().manual_seed(0)
    sides = [torch.randn(count, width, generator=generator) for count in (rows, columns)]
    queries, documents = (torch.nn.functional.normalize(side, dim=1).to(device, dtype) for side in sides)
    positives = torch.randperm(columns, generator=generator)[:rows]
    document_group = torch.randint(groups, (columns,), generator=generator)
    document_ids = torch.arange(columns)
    document_ids[positives[0] - 1] = positives[0]
    query_group = document_group[positives]
    query_group[-1] = groups  # a group without columns
    row_weights = torch.rand(rows, generator=generator)
    return Problem(
        queries, documents, *(x.to(device) for x in (positives, row_weights, query_group, document_group, document_ids))
    )


def dense_loss(problem: Problem, *, symmetric: bool = False) -> list[Tensor]:
    """Losses [rows], and the gradients of both sides for their weighted sum, by all scores at once in float64."""
    queries, documents = (side.double().requires_grad_() for side in (problem.queries, problem.documents))
    scores = queries @ documents.T / TEMPERATURE
    own = scores.gather(1, problem.positives.unsqueeze(1))
    is_negative = problem.positives.unsqueeze(1) != torch.arange(len(documents), device=documents.device)
    if problem.query_group is not None and problem.document_group is not None:
        is_negative &= problem.query_group.unsqueeze(1) == problem.document_group
    if problem.document_ids is not None:
        is_negative &= problem.document_ids[problem.positives].unsqueeze(1) != problem.document_ids
    negatives = scores.masked_fill(~is_negative, float("-inf"))
    losses = torch.logsumexp(torch.cat([own, negatives], dim=1), dim=1) - own.squeeze(1)
    if symmetric:
        rows_of_own = negatives.T[problem.positives]  # [rows, rows]: the scores of a positive where it is a negative
        losses = (losses + torch.logsumexp(torch.cat([own, rows_of_own], dim=1), dim=1) - own.squeeze(1)) / 2
    gradients = torch.autograd.grad((problem.row_weights * losses).sum(), (queries, documents))
    return [losses.detach(), *gradients]


def by_rows(problem: Problem, workspace_mb: int) -> list[Tensor]:
    """The same by grouped_infonce."""
    return _by_rows(problem, workspace_mb=workspace_mb)


def by_both_sides(problem: Problem) -> list[Tensor]:
    """The same of the symmetric loss."""
    return _by_rows(problem, symmetric=True)


def _by_rows(problem: Problem, **options: Any) -> list[Tensor]:
    queries, documents = problem.queries.clone().requires_grad_(), problem.documents.clone().requires_grad_()
    losses = grouped_infonce(queries, documents, problem.positives, **_keywords(problem), **options)
    gradients = torch.autograd.grad((problem.row_weights * losses).sum(), (queries, documents))
    return [losses.detach(), *gradients]


def by_sum(problem: Problem, workspace_mb: int) -> list[Tensor]:
    """The same by weighted_infonce, which forms the gradients together with the losses."""
    queries, documents = problem.queries.clone().requires_grad_(), problem.documents.clone().requires_grad_()
    options = _keywords(problem) | {"row_weights": problem.row_weights, "workspace_mb": workspace_mb}
    total, losses = weighted_infonce(queries, documents, problem.positives, **options)
    return [losses, *torch.autograd.grad(total, (queries, documents))]


def _keywords(problem: Problem) -> dict[str, Any]:
    return {
        "temperature": TEMPERATURE,
        "query_group": problem.query_group,
        "document_group": problem.document_group,
        "document_ids": problem.document_ids,
        # What is chosen is said in the line; the warning of "auto" would say it a second time.
        "implementation": "torch" if fused.obstacle(problem.queries.dtype, problem.queries.device.type) else "fused",
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
