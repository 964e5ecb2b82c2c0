"""What a caller of the loss gave, checked and in the types that the sums take. Computes no score."""

import math
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

HALF = torch.bfloat16, torch.float16
MOST_NUMBERS = 64

_NUMBERS: dict[tuple[float, torch.dtype], Tensor] = {}  # see _kept_number


class Problem(NamedTuple):
    """What the operators of the loss take first, in their order; all of it is contiguous."""

    queries: Tensor  # [rows, width]
    documents: Tensor  # [columns, width], of one float type with the queries
    positives: Tensor  # int64 [rows]
    temperature: Tensor  # [], of the type of the sums
    query_group: Tensor | None  # int64 [rows]
    document_group: Tensor | None  # int64 [columns]
    column_ids: Tensor | None  # int64 [columns]
    positive_ids: Tensor | None  # int64 [rows]: columns with this id are not negatives
    known_ids: Tensor | None  # int64 [rows, known]: nor are those with one of these; -1 = none
    margin: float | None  # in units of q . d
    log_weights: Tensor | None  # [columns], of the type of the sums

    def of_rows(self, part: slice) -> "Problem":
        """The same with some of the rows."""
        return self._replace(
            queries=self.queries[part],
            positives=self.positives[part],
            query_group=_part(self.query_group, part),
            positive_ids=_part(self.positive_ids, part),
            known_ids=_part(self.known_ids, part),
        )

    def of_columns(self, part: slice) -> "Problem":
        """The same with some of the columns; most positives are not among them then."""
        return self._replace(
            documents=self.documents[part],
            positives=self.positives - part.start,
            document_group=_part(self.document_group, part),
            column_ids=_part(self.column_ids, part),
            log_weights=_part(self.log_weights, part),
        )


def checked_arguments(
    queries: Tensor,
    documents: Tensor,
    positives: Tensor,
    temperature: float | Tensor,
    query_group: Tensor | None,
    document_group: Tensor | None,
    document_ids: Tensor | None,
    known_positive_ids: Tensor | None,
    false_negative_margin: float | None,
    keep_duplicates: bool,
    column_weights: Tensor | None,
    symmetric: bool,
) -> Problem:
    """The arguments of grouped_infonce in the types that the sums take.

    raises  ValueError for wrong shapes, types, devices and values, and for arguments that do not go together;
            IndexError for a positive that is no column, if it is looked up. No value on a GPU is looked at
    """
    queries, documents = _checked_embeddings(queries, documents)
    rows, columns = queries.shape[0], documents.shape[0]
    if (query_group is None) != (document_group is None):
        raise ValueError("query_group and document_group go together: give both or none.")
    if known_positive_ids is not None and document_ids is None:
        raise ValueError("known_positive_ids are looked up in document_ids: give document_ids too.")
    if symmetric and column_weights is not None:
        raise ValueError("column_weights weigh columns, and symmetric asks for rows as well: give one of them.")
    if false_negative_margin is not None and not math.isfinite(false_negative_margin):
        raise ValueError(
            f"false_negative_margin is {false_negative_margin}; it must be a finite number, or None for no such mask."
        )
    positives = _checked_ids("positives", positives, (rows,), queries)
    # Every call takes its time, and small batches are called often: what is None is not handed on.
    if query_group is not None and document_group is not None:
        query_group = _checked_ids("query_group", query_group, (rows,), queries)
        document_group = _checked_ids("document_group", document_group, (columns,), queries)
    if document_ids is not None:
        document_ids = _checked_ids("document_ids", document_ids, (columns,), queries)
    if known_positive_ids is not None:
        known_positive_ids = _checked_ids("known_positive_ids", known_positive_ids, (rows, None), queries)
    column_ids = None if keep_duplicates and known_positive_ids is None else document_ids
    # index_select refuses numbers below 0, which would count from the end.
    positive_ids = None if keep_duplicates or column_ids is None else column_ids.index_select(0, positives)
    return Problem(
        queries,
        documents,
        positives,
        _checked_temperature(temperature, queries),
        query_group,
        document_group,
        column_ids,
        positive_ids,
        known_positive_ids,
        false_negative_margin,
        None if column_weights is None else _log_weights(column_weights, queries, columns),
    )


def checked_row_weights(weights: Tensor, queries: Tensor) -> Tensor:
    """The weights of the rows [rows] in the type of the sums; raises ValueError for a wrong shape, type or device."""
    _check_shape("row_weights", weights, (queries.shape[0],), queries)
    if not weights.dtype.is_floating_point:
        raise ValueError(f"row_weights are {weights.dtype}; they must be of a float type. Use row_weights.float().")
    wanted = _dtype_of_sums(queries)
    return (weights if weights.dtype == wanted else weights.to(wanted)).contiguous()


def refuse_positives_outside(positives: Tensor, num_documents: int) -> None:
    """Raise the ValueError that names the first positive which is not the number of a column, if there is one."""
    outside = (positives < 0) | (positives >= num_documents)
    if bool(outside.any()):
        row = int(outside.nonzero()[0])
        raise ValueError(
            f"positives[{row}] is {int(positives[row])}; it must be the number of a column, 0 to {num_documents - 1}."
        )


def _checked_embeddings(queries: Tensor, documents: Tensor) -> tuple[Tensor, Tensor]:
    if queries.ndim != 2 or documents.ndim != 2 or queries.shape[1] != documents.shape[1]:
        raise ValueError(
            f"queries are {list(queries.shape)} and documents {list(documents.shape)}; they must be [rows, width] and "
            "[columns, width] with one width."
        )
    if queries.shape[1] == 0:
        raise ValueError("queries and documents have width 0; they must have at least one dimension.")
    if not _on_one_device(queries, documents):
        raise ValueError(f"queries are on {queries.device} and documents on {documents.device}; move one of them.")
    if queries.dtype != documents.dtype:
        queries, documents = _of_one_type(queries, documents)
    if not queries.dtype.is_floating_point:
        raise ValueError(f"queries and documents are {queries.dtype}; both must be of one float type. Use .float().")
    return queries.contiguous(), documents.contiguous()


def _of_one_type(queries: Tensor, documents: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the wider type; autograd takes each gradient back to its own."""
    if not {queries.dtype, documents.dtype} <= {torch.float32, *HALF}:
        raise ValueError(
            f"queries are {queries.dtype} and documents {documents.dtype}; both must be of one float type. "
            "Cast one of them, as in queries.to(documents.dtype)."
        )
    common = torch.promote_types(queries.dtype, documents.dtype)
    return queries.to(common), documents.to(common)


def _checked_temperature(temperature: float | Tensor, queries: Tensor) -> Tensor:
    """The temperature as a tensor []; on the host, or where the embeddings are."""
    dtype = _dtype_of_sums(queries)
    if not isinstance(temperature, Tensor):
        if torch.compiler.is_compiling():  # where a number may stand for any
            return torch.full((), temperature, dtype=dtype, device="cpu")
        _check_temperature(temperature)
        if type(queries) is Tensor and not torch.is_inference_mode_enabled():
            return _kept_number(temperature, dtype)
        return torch.full((), temperature, dtype=dtype, device="cpu")
    if temperature.ndim != 0 or not temperature.dtype.is_floating_point:
        raise ValueError(
            f"temperature is {temperature.dtype} {list(temperature.shape)}; a tensor must be of a float type and of "
            "shape [], as in torch.tensor(0.05)."
        )
    on_host = temperature.device.type == "cpu"
    if not on_host and temperature.device != queries.device:
        raise ValueError(f"temperature is on {temperature.device} and the embeddings on {queries.device}; move it.")
    if on_host and not torch.compiler.is_compiling():
        _check_temperature(float(temperature.detach()))
    return temperature.to(dtype)


def _kept_number(value: float, dtype: torch.dtype) -> Tensor:
    """A number as a tensor [] on the host. Making one takes longer than all checks, and most calls ask for the same."""
    kept = _NUMBERS.get((value, dtype))
    if kept is None:
        # From numpy: under a mode or a transform of torch its own functions give tensors for that alone.
        kept = torch.from_numpy(numpy.full((), value, dtype="float64" if dtype == torch.float64 else "float32"))
        if len(_NUMBERS) < MOST_NUMBERS:
            _NUMBERS[value, dtype] = kept
    return kept


def _check_temperature(temperature: float) -> None:
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature is {temperature}; it must be a number > 0 (usual: 0.002 to 0.05).")


def _log_weights(weights: Tensor, queries: Tensor, columns: int) -> Tensor:
    _check_shape("column_weights", weights, (columns,), queries)
    if not weights.dtype.is_floating_point or weights.requires_grad:
        raise ValueError(
            f"column_weights are {weights.dtype}{' and require their gradient' if weights.requires_grad else ''}; they "
            "must be of a float type and are not differentiated. Use column_weights.detach().float()."
        )
    on_host = weights.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_host and not bool((weights > 0).all()):
        raise ValueError(f"column_weights go down to {float(weights.min())}; all must be > 0.")
    return weights.to(_dtype_of_sums(queries)).log()


def _checked_ids(name: str, ids: Tensor, shape: tuple[int | None, ...], queries: Tensor) -> Tensor:
    _check_shape(name, ids, shape, queries)
    if ids.dtype != torch.int64:
        raise ValueError(f"{name} is {ids.dtype}; it must be torch.int64. Use {name}.long().")
    return ids.contiguous()


def _check_shape(name: str, given: Tensor, shape: tuple[int | None, ...], queries: Tensor) -> None:
    found = given.shape
    if len(found) != len(shape) or found[0] != shape[0]:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} has shape {list(found)}; it must be [{wanted}].")
    if not _on_one_device(given, queries):
        raise ValueError(f"{name} is on {given.device} and the embeddings on {queries.device}; move one of them.")


def _on_one_device(one: Tensor, other: Tensor) -> bool:
    return (one.is_cpu and other.is_cpu) or one.device == other.device  # of which the latter takes its time


def _dtype_of_sums(queries: Tensor) -> torch.dtype:
    return torch.float64 if queries.dtype == torch.float64 else torch.float32


def _part(values: Tensor | None, part: slice) -> Tensor | None:
    return None if values is None else values[part]
