"""All losses that are compared, by name: this project's and those of peers."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from infonce_lib import peers
from infonce_lib.cases import Inputs, keywords_of
from infonce_lib.peers import Outcome, Step


@dataclass(frozen=True)
class Implementation:
    """A way to compute mean loss and gradients."""

    note: str  # for the legend under a table
    build: Callable[[Inputs], Step]
    variant: str = "plain"  # of cases.VARIANTS: which loss it is
    tangential: bool = False  # normalises its inputs again, so that gradients lack what points along them


def mean_first(inputs: Inputs, **keywords: Any) -> Step:
    """weighted_infonce with weights 1 / rows: the gradient is formed in the forward pass."""
    from tdro_hpc.losses.infonce import weighted_infonce

    rows = inputs.case.shape.rows
    weights = torch.full((rows,), 1 / rows)

    def loss_of() -> torch.Tensor:
        total, _ = weighted_infonce(
            inputs.queries, inputs.documents, inputs.positives, row_weights=weights, **_given(inputs, keywords)
        )
        return total

    return peers.by_autograd(inputs, loss_of)


def rows_first(inputs: Inputs, **keywords: Any) -> Step:
    """grouped_infonce, whose rows are weighted after the forward pass: here by their mean."""
    from tdro_hpc.losses.infonce import grouped_infonce

    def loss_of() -> torch.Tensor:
        given = _given(inputs, keywords)
        return grouped_infonce(inputs.queries, inputs.documents, inputs.positives, **given).mean()

    return peers.by_autograd(inputs, loss_of)


def learned_temperature(inputs: Inputs, **keywords: Any) -> Step:
    """mean_first with the gradient of the temperature beside the others."""
    from tdro_hpc.losses.infonce import weighted_infonce

    rows = inputs.case.shape.rows
    weights = torch.full((rows,), 1 / rows)
    temperature = torch.tensor(inputs.case.temperature, requires_grad=True)

    def step() -> Outcome:
        given = _given(inputs, keywords) | {"temperature": temperature}
        total, _ = weighted_infonce(inputs.queries, inputs.documents, inputs.positives, row_weights=weights, **given)
        wanted = (inputs.queries, inputs.documents, temperature)
        queries, documents, _ = torch.autograd.grad(total, wanted)
        return Outcome(total.detach(), queries, [documents])

    return step


def _given(inputs: Inputs, keywords: dict[str, Any]) -> dict[str, Any]:
    case = inputs.case
    return {"temperature": case.temperature, "implementation": case.implementation} | keywords


def _ours(note: str, first: Callable[..., Step], variant: str = "plain", **fixed: Any) -> Implementation:
    def build(inputs: Inputs) -> Step:
        return first(inputs, **keywords_of(variant, inputs.case.shape), **fixed)

    return Implementation(note, build, variant)


OURS = {
    "mean": _ours("ours, `weighted_infonce` with weights 1 / B: the mean loss", mean_first),
    "rows": _ours("ours, `grouped_infonce(...).mean()`: one loss a row, weighted afterwards", rows_first),
    "mean 256 MB": _ours("ours, mean with `workspace_mb=256`", mean_first, workspace_mb=256),
    "rows 256 MB": _ours("ours, rows with `workspace_mb=256`", rows_first, workspace_mb=256),
    "torch tiles": _ours("ours, `implementation='torch'`", mean_first, implementation="torch"),
    "symmetric": _ours("ours, mean with `symmetric=True`", mean_first, "symmetric"),
    "ids": _ours("ours, mean with `document_ids`, each text twice among the columns", mean_first, "ids"),
    "known": _ours("ours, mean with four `known_positive_ids` a row", mean_first, "known"),
    "margin": _ours("ours, mean with `false_negative_margin`", mean_first, "margin"),
    "column weights": _ours("ours, mean with `column_weights`", mean_first, "column weights"),
    "temperature": _ours("ours, mean with the gradient of the temperature", learned_temperature),
    "sorted groups": _ours("ours, mean, 25 equal groups one after the other", mean_first, "sorted groups"),
    "mixed groups": _ours("ours, mean, 25 equal groups in random order", mean_first, "mixed groups"),
    "own": _ours("ours, mean, each row with its own columns only", mean_first, "own candidates"),
    "own rows": _ours("ours, rows, each row with its own columns only", rows_first, "own candidates"),
}

PEERS = {
    "naive": Implementation("`matmul`, then `cross_entropy`", peers.naive),
    "naive rows": Implementation("naive with a loss a row, then their mean", peers.naive_rows),
    "naive mask": Implementation("naive with other groups masked", peers.naive_mask, "sorted groups"),
    "naive loop": Implementation("naive in a loop over sorted groups", peers.naive_loop, "sorted groups"),
    "torch chunked": Implementation(
        "`torch.nn.functional.linear_cross_entropy`, chunks chosen by torch", peers.torch_chunked
    ),
    "torch chunked 256": Implementation(
        "the same in chunks of 256 rows",
        partial(peers.torch_chunked, batch_chunk_size=256, chunking_method=None, acc_policy="compact"),
    ),
    "checkpoint 256": Implementation(
        "256 rows at a time under `torch.utils.checkpoint`", partial(peers.checkpointed_rows, rows=256)
    ),
    "ST cached": Implementation(
        "loss stage of sentence-transformers' CachedMultipleNegativesRankingLoss at its defaults (mini_batch_size=32)",
        partial(peers.sentence_transformers_cached, mini_batch_size=32, similarity="cos_sim"),
        tangential=True,
    ),
    "ST cached dot 256": Implementation(
        "the same with dot_score and mini_batch_size=256",
        partial(peers.sentence_transformers_cached, mini_batch_size=256, similarity="dot_score"),
    ),
    "tiled probe": Implementation("two sweeps over tiles, in Python, with oneDNN's products", peers.tiled_probe),
}

IMPLEMENTATIONS = OURS | PEERS
