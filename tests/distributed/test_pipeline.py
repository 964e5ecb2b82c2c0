"""Models spread over 2, 4 and 8 ranks by layers and by matrices, against one process. One launch a number of ranks."""

from dataclasses import replace

import pytest
import torch

from tdro_hpc.encoders.backbone import load_encoder, save_encoder
from tdro_hpc.encoders.tiny import tiny_backbone
from tdro_hpc.encoders.tokenization import load_tokenizer
from tests.distributed.launching import run_ranks
from tests.distributed.pipeline_rank import (
    CASES,
    LORA,
    PLAIN,
    STEPS,
    alone,
    models,
    one_step,
    put_together,
    torch_engine,
)
from tests.reference.toy import toy_tokens

CLOSE = 1e-5  # float32 sums in another order
ROUNDED = 0.05  # bfloat16 has 8 bits; sums in another order differ in the last of them, layer by layer
HALF = [case for case in CASES if "bf16" in case.model or "autocast" in case.model]
SINGLE = [case for case in CASES if case not in HALF]


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """What one process finds for each model, and where the inputs of the ranks are."""
    inputs = tmp_path_factory.mktemp("pipeline") / "inputs"
    inputs.mkdir()
    tiny_backbone("qwen3", seed=3).save_pretrained(inputs / "sharded", max_shard_size="400KB")
    for name, lora in (("saved", PLAIN.lora), ("adapter", LORA)):
        config = replace(PLAIN, name="tiny:qwen2", lora=lora)
        encoder = load_encoder(config, device="cpu", seed=9)
        for parameter in encoder.parameters():
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4))
        save_encoder(encoder, load_tokenizer(config), inputs / name)
    found = {}
    for case in CASES:
        if (case.model, case.unclipped) not in found:
            found[case.model, case.unclipped] = alone(models(inputs)[case.model], case.training)
    torch.save(put_together([found["qwen3", False]["states"]["before"]]), inputs / "alone.pt")
    return inputs, found


@pytest.fixture(scope="module")
def launches(references, tmp_path_factory):
    """What each rank of each launch found, by the number of ranks; launched when it is asked for."""
    inputs, _ = references
    done = {}

    def of(world):
        if world not in done:
            folder = tmp_path_factory.mktemp(f"ranks{world}")
            (folder / "inputs").symlink_to(inputs)
            run_ranks("pipeline_rank.py", folder, world, [])
            done[world] = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]
        return done[world]

    return of


def difference(found, wanted):
    """Length of the difference, relative to the length of what is wanted."""
    return ((found.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-30)).item()


def worst(found, wanted, kind):
    """Largest difference of the tensors of a kind, with its name; both states have the same tensors."""
    assert found.keys() == wanted.keys()
    return max((difference(found[name], value), name) for name, value in wanted.items() if name.startswith(kind))


def ranks_of(case, launches):
    """What the ranks of a case found, and for each data index one of them."""
    ranks = [rank[str(case)] for rank in launches(case.world)]
    return ranks, [next(rank for rank in ranks if rank["place"][1] == index) for index in range(case.dp)]


def wanted_of(case, references):
    return references[1][case.model, case.unclipped]


@pytest.mark.parametrize("case", SINGLE, ids=str)
def test_embeddings_losses_and_norms_are_those_of_one_process(case, launches, references):
    ranks, replicas = ranks_of(case, launches)
    wanted = wanted_of(case, references)
    assert ranks[0]["counts"] == wanted["counts"]
    for step in range(STEPS):
        target = wanted["steps"][step]
        seen = [replica["steps"][step] for replica in replicas]
        for part in range(2):
            embeddings = torch.cat([replica["embeddings"][part] for replica in seen])
            assert difference(embeddings, target["embeddings"][part]) <= CLOSE
        assert difference(torch.cat([replica["losses"] for replica in seen]), target["losses"]) <= CLOSE
        for rank in ranks:
            assert difference(rank["steps"][step]["norm"], target["norm"]) <= CLOSE
        assert case.unclipped or target["norm"] > case.training.max_grad_norm, "the step is clipped"


@pytest.mark.parametrize("case", SINGLE, ids=str)
def test_every_gradient_and_every_parameter_after_three_steps_is_that_of_one_process(case, launches, references):
    ranks, _ = ranks_of(case, launches)
    wanted = wanted_of(case, references)["states"]
    first = put_together([rank["states"]["first"] for rank in ranks])["tensors"]
    # After the first step the first moment is a tenth of the gradient.
    difference, name = worst(first, wanted["first"]["tensors"], "optimizer.exp_avg.")
    assert difference <= CLOSE, name
    last = put_together([rank["states"]["last"] for rank in ranks])
    difference, name = worst(last["tensors"], wanted["last"]["tensors"], "parameter.")
    assert difference <= CLOSE, name
    assert last["values"] == wanted["last"]["values"]


def test_ranks_of_a_replica_have_the_same_bits_and_replicas_their_own_chunks(launches):
    numbers = set()
    for case in CASES:
        ranks, replicas = ranks_of(case, launches)
        for rank in ranks:
            mine = replicas[rank["place"][1]]
            for step in range(STEPS):
                for part in range(2):
                    assert torch.equal(rank["steps"][step]["embeddings"][part], mine["steps"][step]["embeddings"][part])
        chunks = [replica["steps"][0]["chunks"] for replica in replicas]
        assert min(chunks) > case.pp, "the pipeline is full"
        numbers |= {len(set(chunks))}
    assert 2 in numbers, "replicas with different numbers of chunks wait for none of the others'"


@pytest.mark.parametrize("case", [case for case in CASES if case.resume], ids=str)
def test_resumed_step_is_bit_equal_to_the_unbroken_one(case, launches):
    ranks, _ = ranks_of(case, launches)
    unbroken = put_together([rank["states"]["last"] for rank in ranks])["tensors"]
    resumed = put_together([rank["resumed"] for rank in ranks])["tensors"]
    before = put_together([rank["states"]["before"] for rank in ranks])["tensors"]
    assert unbroken.keys() == resumed.keys()
    assert [name for name, value in unbroken.items() if not torch.equal(value, resumed[name])] == []
    assert [name for name, value in unbroken.items() if torch.equal(value, before[name])] == [], "the step moves all"


def test_state_of_a_pipeline_goes_on_in_one_process(launches, references):
    case = next(case for case in CASES if case.model == "qwen3" and case.world == 4)
    ranks, _ = ranks_of(case, launches)
    engine = torch_engine(models(references[0])["qwen3"])
    engine.load_state_dict(put_together([rank["states"]["before"] for rank in ranks]))
    one_step(engine, STEPS - 1)
    wanted = wanted_of(case, references)["states"]["last"]["tensors"]
    assert worst(engine.state_dict()["tensors"], wanted, "parameter.")[0] <= CLOSE


def test_state_of_one_process_goes_on_in_a_pipeline_and_another_models_is_refused(launches, references):
    found = [rank["other layout"] for rank in launches(4)]
    wanted = references[1]["qwen3", False]["states"]["last"]["tensors"]
    assert worst(put_together([state for state, _ in found])["tensors"], wanted, "parameter.")[0] <= CLOSE
    assert all("does not fit this encoder" in words for _, words in found)


def test_frozen_pipeline_embeds_as_the_saved_model_does(launches, references):
    for name in ("saved", "adapter"):
        encoder = load_encoder(replace(PLAIN, name="tiny:qwen2"), folder=references[0] / name, device="cpu", seed=0)
        plain = load_encoder(replace(PLAIN, name="tiny:qwen2"), device="cpu", seed=0)
        for number, tokens in enumerate(toy_tokens(seed, 3, width=30) for seed in (1, 2, 3)):
            with torch.no_grad():
                wanted, unchanged = encoder(tokens), plain(tokens)
            assert difference(unchanged, wanted) > 0.01, "the weights of the folder are others than those of the name"
            for rank in launches(4):
                assert difference(rank["frozen"][name][number], wanted) <= CLOSE


@pytest.mark.parametrize("case", HALF, ids=str)
def test_bfloat16_differs_from_one_process_by_rounding_only(case, launches, references):
    ranks, replicas = ranks_of(case, launches)
    wanted = wanted_of(case, references)
    target = wanted["steps"][0]
    for part in range(2):
        embeddings = torch.cat([replica["steps"][0]["embeddings"][part] for replica in replicas])
        assert difference(embeddings, target["embeddings"][part]) <= ROUNDED
    assert difference(ranks[0]["steps"][0]["norm"], target["norm"]) <= ROUNDED
    first = put_together([rank["states"]["first"] for rank in ranks])["tensors"]
    assert {value.dtype for value in first.values()} == {torch.float32}, "masters and moments have 32 bits"
    moments = {name: value for name, value in wanted["states"]["first"]["tensors"].items() if "exp_avg." in name}
    whole, mine = (torch.cat([state[name].flatten().double() for name in moments]) for state in (moments, first))
    assert difference(mine, whole) <= 2 * ROUNDED
    assert worst({name: first[name] for name in moments}, moments, "")[0] < 0.5, "no parameter lacks a rank's share"
