"""What each argument of the loss means in the cases at its edge, and what is said of a wrong one."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tdro_hpc.losses import grouped_infonce, weighted_infonce
from tests.reference.loss_cases import IMPLEMENTATIONS, choices, embeddings, values_and_gradients

both = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


@both
def test_row_without_negatives_has_loss_zero_and_no_gradient(implementation):
    queries, documents = (vectors.float() for vectors in embeddings(6, 3, 4))
    groups = {"query_group": torch.tensor([0, 1, 7]), "document_group": torch.tensor([0, 1, 1, 3])}
    positives = torch.tensor([0, 1, 3])  # alone in group 0; one negative in group 1; group 7 has no column at all
    options = groups | {"temperature": 0.05, "implementation": implementation}
    losses, query_gradient, _ = values_and_gradients(
        grouped_infonce, queries, documents, positives, torch.ones(3), **options
    )
    assert losses[0] == 0 and losses[1] > 0 and losses[2] == 0
    assert (query_gradient[[0, 2]] == 0).all() and (query_gradient[1] != 0).any()


@both
def test_everything_masked_is_loss_zero_and_no_gradient(implementation):
    queries, documents = (vectors.float() for vectors in embeddings(6, 3, 4))
    same = {"document_ids": torch.full((4,), 5), "temperature": 0.05, "implementation": implementation}
    for options in (same, same | {"symmetric": True}, same | {"false_negative_margin": 3.0}):
        found = values_and_gradients(
            grouped_infonce, queries, documents, torch.tensor([0, 1, 2]), torch.ones(3), **options
        )
        assert all((values == 0).all() for values in found)


@both
def test_positive_of_another_group_counts(implementation):
    queries, documents = (vectors.float() for vectors in embeddings(7, 1, 3))
    groups = {"query_group": torch.tensor([1]), "document_group": torch.tensor([1, 0, 0])}
    inputs = queries, documents, torch.tensor([2])
    losses, query_gradient, document_gradient = values_and_gradients(
        grouped_infonce, *inputs, torch.ones(1), temperature=0.5, implementation=implementation, **groups
    )
    logits = (documents[[2, 0]] @ queries[0]) / 0.5
    assert losses[0].item() == pytest.approx((torch.logsumexp(logits, 0) - logits[0]).item())
    share = torch.softmax(logits, dim=0)[1]
    torch.testing.assert_close(query_gradient[0], share * (documents[0] - documents[2]) / 0.5)
    torch.testing.assert_close(document_gradient[2], -share * queries[0] / 0.5)


@both
def test_padding_of_known_positives_matches_no_column(implementation):
    queries, documents = (vectors.float() for vectors in embeddings(8, 1, 3))
    inputs, options = (queries, documents, torch.tensor([0])), {"temperature": 0.1, "implementation": implementation}
    ids = {"document_ids": torch.tensor([5, -1, -1]), "known_positive_ids": torch.tensor([[-1]])}
    assert torch.equal(grouped_infonce(*inputs, **options, **ids), grouped_infonce(*inputs, **options))


@both
def test_a_temperature_may_first_be_met_where_no_gradient_can_follow(implementation):
    """Tensors of inference mode, and those of no values, are not for a later call that trains."""
    queries, documents, positives = torch.eye(2), torch.eye(2), torch.arange(2)
    options = {"temperature": 0.123, "implementation": implementation}
    with torch.inference_mode():
        wanted = grouped_infonce(torch.eye(2), documents, positives, **options)
        grouped_infonce(queries, documents, positives, **options)
    with FakeTensorMode() as fake:
        sides = fake.from_tensor(queries).requires_grad_(), fake.from_tensor(documents)
        weights = {"row_weights": fake.from_tensor(torch.ones(2))}
        assert weighted_infonce(*sides, fake.from_tensor(positives), **weights, **options)[1].shape == (2,)
    for _ in range(2):
        losses = grouped_infonce(queries.requires_grad_(), documents, positives, **options)
        losses.sum().backward()
        assert torch.equal(losses, wanted) and queries.grad.isfinite().all()


@both
def test_keep_duplicates_takes_document_ids_for_known_positives_only(implementation):
    queries, documents = (vectors.float() for vectors in embeddings(8, 1, 4))
    inputs, options = (queries, documents, torch.tensor([0])), {"temperature": 0.1, "implementation": implementation}
    ids = {"document_ids": torch.tensor([5, 5, 6, 7]), "keep_duplicates": True}
    assert torch.equal(grouped_infonce(*inputs, **options, **ids), grouped_infonce(*inputs, **options))
    found = grouped_infonce(*inputs, known_positive_ids=torch.tensor([[7]]), **options, **ids)
    wanted = grouped_infonce(queries, documents[:3], torch.tensor([0]), **options)
    torch.testing.assert_close(found, wanted)


@both
def test_a_column_of_weight_three_is_three_columns(implementation):
    queries, documents = (vectors.float() for vectors in embeddings(8, 2, 3))
    options = {"temperature": 0.1, "implementation": implementation}
    weights = torch.tensor([3.0, 1.0, 1.0], dtype=torch.float64)  # the positive of row 1 has a weight of its own
    found = grouped_infonce(queries, documents, torch.tensor([1, 0]), column_weights=weights, **options)
    tripled = documents[[0, 0, 0, 1, 2]]
    assert found[0].item() == pytest.approx(
        grouped_infonce(queries[:1], tripled, torch.tensor([3]), **options).item(), rel=1e-5
    )
    plain = grouped_infonce(queries, documents, torch.tensor([1, 0]), **options)
    assert torch.equal(found[1], plain[1])  # but counts once as the positive


@both
@pytest.mark.parametrize("side", [0, 1])
def test_a_number_that_is_none_reaches_the_loss(implementation, side):
    inputs = [vectors.float() for vectors in embeddings(9, 3, 40)]
    inputs[side][1, 2] = torch.nan
    for symmetric in (False, True):
        options = {"temperature": 0.1, "implementation": implementation, "symmetric": symmetric}
        losses = grouped_infonce(*inputs, torch.tensor([0, 2, 4]), **options)
        assert losses.isnan().any()


def test_float64_stays_float64_and_is_not_for_the_library():
    queries, documents = embeddings(10, 3, 9)
    losses = grouped_infonce(queries, documents, torch.arange(3), temperature=0.1)
    assert losses.dtype == torch.float64
    with pytest.raises(ValueError, match="implementation is 'fused', but .*the embeddings are torch.float64"):
        grouped_infonce(queries, documents, torch.arange(3), temperature=0.1, implementation="fused")


GOOD = {
    "queries": torch.ones(2, 3),
    "documents": torch.ones(4, 3),
    "positives": torch.tensor([0, 2]),
    "temperature": 0.1,
}


@both
@pytest.mark.parametrize("positives", [[0, 4], [0, -1]])
@pytest.mark.parametrize("ids", [{}, {"document_ids": torch.arange(4)}])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_positive_that_is_no_column_is_named(implementation, positives, ids, weighted):
    queries = torch.ones(2, 3, requires_grad=True)
    inputs = queries, torch.ones(4, 3), torch.tensor(positives)
    with pytest.raises(
        ValueError, match=rf"positives\[1\] is {positives[1]}; it must be the number of a column, 0 to 3"
    ):
        if weighted:
            weighted_infonce(*inputs, row_weights=torch.ones(2), temperature=0.1, implementation=implementation, **ids)
        else:
            grouped_infonce(*inputs, temperature=0.1, implementation=implementation, **ids)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"temperature": 0.0}, "temperature is 0.0; it must be a number > 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": torch.tensor(-0.1)}, "temperature is -0.1.*must be a number > 0"),
        ({"temperature": torch.tensor([0.1])}, r"temperature is torch.float32 \[1\]; a tensor must be of a float type"),
        ({"temperature": torch.tensor(1)}, r"temperature is torch.int64 \[\]"),
        ({"temperature": torch.tensor(0.1, device="meta")}, "temperature is on meta and the embeddings on cpu"),
        ({"documents": torch.ones(4, 2)}, r"queries are \[2, 3\] and documents \[4, 2\]"),
        (
            {"queries": torch.ones(2, 0), "documents": torch.ones(4, 0)},
            "width 0; they must have at least one dimension",
        ),
        ({"documents": torch.ones(4, 3).double()}, "one float type"),
        ({"queries": torch.ones(2, 3).long(), "documents": torch.ones(4, 3).long()}, "one float type"),
        ({"documents": torch.ones(4, 3, device="meta")}, "documents on meta"),
        ({"positives": torch.tensor([0])}, r"positives has shape \[1\]; it must be \[2\]"),
        ({"positives": torch.tensor([0, 1]).int()}, "positives is torch.int32; it must be torch.int64"),
        ({"query_group": torch.tensor([0, 1])}, "give both or none"),
        ({"known_positive_ids": torch.tensor([[1], [1]])}, "give document_ids too"),
        ({"document_ids": torch.arange(3)}, r"document_ids has shape \[3\]; it must be \[4\]"),
        ({"document_ids": torch.arange(4, device="meta")}, "document_ids is on meta"),
        ({"false_negative_margin": float("inf")}, "false_negative_margin is inf"),
        ({"column_weights": torch.ones(3)}, r"column_weights has shape \[3\]; it must be \[4\]"),
        ({"column_weights": torch.tensor([1.0, 0.0, 2.0, 1.0])}, "column_weights go down to 0.0; all must be > 0"),
        ({"column_weights": torch.ones(4).long()}, "column_weights are torch.int64; they must be of a float type"),
        ({"column_weights": torch.ones(4, requires_grad=True)}, "column_weights .* require their gradient"),
        ({"column_weights": torch.ones(4), "symmetric": True}, "column_weights weigh columns"),
        ({"implementation": "fast"}, "implementation is 'fast'; it must be one of auto, fused, torch"),
    ],
)
def test_wrong_arguments_are_named(change, words):
    with pytest.raises(ValueError, match=words):
        grouped_infonce(**(GOOD | change))
    with pytest.raises(ValueError, match=words):
        weighted_infonce(**(GOOD | {"row_weights": torch.ones(2)} | change))


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (torch.ones(3), r"row_weights has shape \[3\]; it must be \[2\]"),
        (torch.ones(2).long(), "row_weights are torch.int64; they must be of a float type"),
        (torch.ones(2, device="meta"), "row_weights is on meta"),
    ],
)
def test_wrong_row_weights_are_named(weights, words):
    with pytest.raises(ValueError, match=words):
        weighted_infonce(**(GOOD | {"row_weights": weights}))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("implementation", ["torch", "auto"])
def test_cuda_gives_what_the_cpu_gives_and_the_same_bits_each_time(masks, implementation):
    queries, documents = (vectors.float() for vectors in embeddings(14, 40, 90))
    positives, options = choices(15, 40, 90)
    positives = positives % 7  # many rows share a positive: their gradients must be summed in one order
    options = (options if masks else {}) | {"temperature": 0.02}
    inputs = queries, documents, positives, torch.ones(40)
    wanted = values_and_gradients(grouped_infonce, *inputs, implementation="torch", **options)
    on_gpu = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    first, again = (
        values_and_gradients(grouped_infonce, *(x.cuda() for x in inputs), implementation=implementation, **on_gpu)
        for _ in range(2)
    )
    for got, want, repeated in zip(first, wanted, again, strict=True):
        torch.testing.assert_close(got.cpu(), want, rtol=1e-4, atol=1e-4)  # float32 scores over a temperature of 0.02
        assert torch.equal(got, repeated)
