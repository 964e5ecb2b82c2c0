"""The compiled library on the host, within the memory that a call may use beside its gradients (its room).

Gradients of float32 embeddings are what the library gives. Those of half precision are summed in float32 first. Where
the sums fit the room they are formed in one go; else those of a few queries at a time over all documents, then those of
a few documents at a time over all queries, which costs each score once more.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from tdro_hpc.losses.arguments import Problem

Sides = tuple[bool, bool]  # whether the gradients of the queries, of the documents are asked for
MEGABYTE = 1 << 20


def losses(problem: Problem, workspace_mb: int, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Losses [rows], scores of the positives [rows], and what was kept of the exponentials for losses_backward.

    keep   whether that follows: as much is kept as the room allows, and those scores are not computed again
    """
    room = room_of(problem.queries, problem.documents, workspace_mb)
    in_parts = _bytes_of_sums(problem, (True, True)) > room
    workspace = room if in_parts else _left(problem, room)
    return torch.ops.tdro_hpc.infonce_losses.default(*problem, keep and not in_parts, workspace)


def losses_backward(
    problem: Problem, found: tuple[Tensor, Tensor, Tensor], row_weights: Tensor, workspace_mb: int, sides: Sides
) -> list[Tensor]:
    """Gradients [of queries, of documents] of sum(row_weights * losses) after `losses`, which gave `found`.

    returns   each in the type of the embeddings, empty where it is not asked for
    """
    room = room_of(problem.queries, problem.documents, workspace_mb)
    if _bytes_of_sums(problem, (True, True)) <= room:
        left = _left(problem, room)
        gradients = torch.ops.tdro_hpc.infonce_losses_backward.default(*problem, *found, row_weights, left, *sides)
        return _in_type(list(gradients), problem.queries.dtype)
    row_losses, scores, _ = found
    of_queries = problem.queries.new_empty(problem.queries.shape if sides[0] else (0,))
    for part in _parts(of_queries, room // 16):
        of_queries[part] = _of_part(problem.of_rows(part), row_losses[part], scores[part], row_weights[part], room, 0)
    return [of_queries, _documents_by_parts(problem, row_losses, scores, row_weights, room, sides)]


def forward_backward(
    problem: Problem, row_weights: Tensor, workspace_mb: int, sides: Sides
) -> tuple[Tensor, list[Tensor]]:
    """Losses [rows], and gradients like those of losses_backward after `losses`, with fewer products."""
    operator = torch.ops.tdro_hpc.infonce_gradients.default
    room, sums = room_of(problem.queries, problem.documents, workspace_mb), _bytes_of_sums(problem, sides)
    if sums <= room:
        row_losses, _, *gradients = operator(*problem, row_weights, room - sums * 3 // 4, *sides)
        return row_losses, _in_type(gradients, problem.queries.dtype)
    row_losses, scores = torch.empty_like(row_weights), torch.empty_like(row_weights)
    of_queries = problem.queries.new_empty(problem.queries.shape if sides[0] else (0,))
    for part in _parts(problem.queries, room // 16):
        of_part = problem.of_rows(part)
        found = operator(*of_part, row_weights[part], _left_beside(of_part.queries, room, 0), sides[0], False)
        row_losses[part], scores[part] = found[:2]
        if sides[0]:
            of_queries[part] = found[2]
    return row_losses, [of_queries, _documents_by_parts(problem, row_losses, scores, row_weights, room, sides)]


def room_of(queries: Tensor, documents: Tensor, workspace_mb: int) -> int:
    """Bytes that a call may use beside its gradients: what is allowed, or a quarter of the gradients if more."""
    return max(workspace_mb * MEGABYTE, (queries.nbytes + documents.nbytes) // 4)


def _documents_by_parts(
    problem: Problem, row_losses: Tensor, scores: Tensor, row_weights: Tensor, room: int, sides: Sides
) -> Tensor:
    of_documents = problem.documents.new_empty(problem.documents.shape if sides[1] else (0,))
    for part in _parts(of_documents, room // 4):
        of_documents[part] = _of_part(problem.of_columns(part), row_losses, scores, row_weights, room, 1)
    return of_documents


def _of_part(problem: Problem, row_losses: Tensor, scores: Tensor, row_weights: Tensor, room: int, side: int) -> Tensor:
    """The float32 gradient of one side of a part."""
    found = row_losses, scores, row_losses.new_empty(0)
    operator = torch.ops.tdro_hpc.infonce_losses_backward.default
    left = _left_beside((problem.queries, problem.documents)[side], room, side)
    return operator(*problem, *found, row_weights, left, side == 0, side == 1)[side]


def _left_beside(part: Tensor, room: int, side: int) -> int:
    """What a call of the library may use beside the float32 gradient of a part of a side; documents come second."""
    spare = room // (8, 4)[side]  # after the parts of the queries the allocator keeps some of their memory
    return max(room - spare - 4 * part.numel(), room // 4)


def _parts(embeddings: Tensor, room: int) -> Iterator[slice]:
    """Parts whose float32 gradients fit a room, in whole panels of the library."""
    if len(embeddings) == 0:
        return
    size = max(room // max(4 * embeddings.shape[1], 1) // 256 * 256, 256)
    for start in range(0, len(embeddings), size):
        yield slice(start, min(start + size, len(embeddings)))


def _bytes_of_sums(problem: Problem, sides: Sides) -> int:
    """Memory of float32 sums beside the gradients; 0 where the sums are the gradients."""
    if problem.queries.dtype == torch.float32:
        return 0
    return 4 * (problem.queries.numel() * sides[0] + problem.documents.numel() * sides[1])


def _left(problem: Problem, room: int) -> int:
    """What a call of the library may use beside sums that fit, and beside what they are turned into."""
    return max(room - _bytes_of_sums(problem, (True, True)) * 5 // 4, room // 4)


def _in_type(gradients: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Gradients in a type. Empties the list, so that float32 sums are freed one by one."""
    if dtype == torch.float32:
        return gradients
    of_documents = gradients.pop().to(dtype)
    return [gradients.pop().to(dtype), of_documents]
