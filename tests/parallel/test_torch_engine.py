"""The engine of one process: steps as torch does them by hand, and states that give back every bit."""

import dataclasses
import json

import pytest
import torch

from tdro_hpc.config.schema import TrainingConfig
from tdro_hpc.parallel.optimizer import build_optimizer
from tdro_hpc.parallel.process import Process
from tdro_hpc.parallel.schedule import learning_rate_at
from tdro_hpc.parallel.torch_engine import TorchEngine
from tests.reference.toy import ToyEncoder, toy_tokens

ALONE = Process(data_rank=0, data_size=1, local_rank=0, device=torch.device("cpu"))
TRAINING = TrainingConfig(steps=20, warmup_steps=2, learning_rate=0.01, max_grad_norm=0.05)


def toy_loss(engine, seed):
    queries, passages = engine.embed([toy_tokens(seed, 4), toy_tokens(seed + 1, 4)])
    return ((queries - passages) ** 2).sum()


def train(engine, steps):
    """Norms of some steps, each with draws and data of its own."""
    norms = []
    for step in steps:
        torch.manual_seed(step)
        engine.backward(toy_loss(engine, 10 * step), synchronise=True)
        norms.append(engine.step())
    return torch.stack(norms)


def cloned(state):
    tensors = {name: tensor.clone() for name, tensor in state["tensors"].items()}
    return {"tensors": tensors, "values": json.loads(json.dumps(state["values"]))}


@pytest.mark.parametrize("max_grad_norm", [0.05, 0.0])
def test_steps_are_adamw_with_clipping_and_schedule(max_grad_norm):
    training = dataclasses.replace(TRAINING, max_grad_norm=max_grad_norm)
    engine = TorchEngine(ToyEncoder(), ALONE, training)
    norms = train(engine, range(4))
    plain = ToyEncoder()
    optimizer = torch.optim.AdamW(plain.parameters(), weight_decay=0)
    for step in range(4):
        rate = learning_rate_at(step, training)
        queries, passages = plain(toy_tokens(10 * step, 4)), plain(toy_tokens(10 * step + 1, 4))
        ((queries - passages) ** 2).sum().backward()
        trained = [p for p in plain.parameters() if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in trained]).norm()
        assert norms[step].item() == pytest.approx(norm.item(), rel=1e-5) and norm > 0.05
        with torch.no_grad():
            for p in trained:
                p.grad *= min(1.0, max_grad_norm / (norm.item() + 1e-6)) if max_grad_norm else 1.0
                if p.ndim == 2:
                    p *= 1 - rate * training.weight_decay
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    for (name, found), wanted in zip(engine.encoder.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6, msg=name)  # fused and plain AdamW round apart


def test_decay_is_on_matrices_only_and_frozen_parameters_are_left_out():
    encoder = ToyEncoder()
    optimizer = build_optimizer(encoder, TRAINING)
    names = {id(parameter): name for name, parameter in encoder.named_parameters()}
    decayed, plain = ([names[id(p)] for p in group["params"]] for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert decayed == ["embedding.weight", "dense.weight", "unread_pooler.weight"]
    assert plain == ["dense.bias", "norm.weight", "norm.bias", "unread_pooler.bias"]


def test_encoder_without_trained_parameters_is_refused():
    with pytest.raises(ValueError, match="No parameter of the encoder is trained"):
        TorchEngine(ToyEncoder().requires_grad_(False), ALONE, TRAINING)


def test_frozen_embedding_draws_what_a_later_embed_draws():
    engine = TorchEngine(ToyEncoder(dropout=0.5).eval(), ALONE, TRAINING)
    tokens = toy_tokens(3, 6)
    torch.manual_seed(5)
    frozen = engine.embed_frozen(tokens)
    torch.manual_seed(5)
    (embedded,) = engine.embed([tokens])
    assert not frozen.requires_grad and embedded.requires_grad
    assert torch.equal(frozen, embedded)
    assert not torch.equal(frozen, engine.embed_frozen(tokens)), "dropout is on: the engine trains"


@pytest.mark.parametrize("autocast", ["float32", "float16"])
def test_resumed_training_is_bit_equal_to_the_unbroken_one(autocast):
    unbroken = TorchEngine(ToyEncoder(dropout=0.3, autocast=autocast), ALONE, TRAINING)
    train(unbroken, range(3))
    saved = cloned(unbroken.state_dict())
    wanted = train(unbroken, range(3, 6))
    resumed = TorchEngine(ToyEncoder(dropout=0.3, autocast=autocast, seed=9), ALONE, TRAINING)
    resumed.encoder.frozen.load_state_dict(unbroken.encoder.frozen.state_dict())  # comes from the backbone's files
    resumed.load_state_dict(saved)
    assert resumed.steps_done == 3 and resumed.learning_rate == learning_rate_at(2, TRAINING)
    assert torch.equal(train(resumed, range(3, 6)), wanted)
    states = unbroken.state_dict(), resumed.state_dict()
    assert states[0]["values"] == states[1]["values"]
    assert states[0]["tensors"].keys() == states[1]["tensors"].keys()
    assert all(torch.equal(tensor, states[1]["tensors"][name]) for name, tensor in states[0]["tensors"].items())


def test_state_holds_moments_and_counters_and_is_not_changed_by_training_on():
    engine = TorchEngine(ToyEncoder(), ALONE, TRAINING)
    train(engine, range(2))
    names = set(engine.state_dict()["tensors"])
    assert {f"optimizer.{field}.dense.weight" for field in ("step", "exp_avg", "exp_avg_sq")} <= names
    assert "parameter.unread_pooler.weight" in names and not any("frozen" in name for name in names)
    saved = cloned(engine.state_dict())
    before = cloned(saved)
    engine.load_state_dict(saved)
    train(engine, range(2, 4))
    assert all(torch.equal(tensor, before["tensors"][name]) for name, tensor in saved["tensors"].items())


def test_persistent_buffers_are_state_too():
    encoder = ToyEncoder()
    encoder.register_buffer("seen", torch.tensor([3.0]))
    encoder.register_buffer("table", torch.tensor([4.0]), persistent=False)
    tensors = TorchEngine(encoder, ALONE, TRAINING).state_dict()["tensors"]
    assert [name for name in tensors if name.startswith("buffer.")] == ["buffer.seen"]


def test_state_of_another_encoder_is_refused():
    state = cloned(TorchEngine(ToyEncoder(), ALONE, TRAINING).state_dict())
    other = ToyEncoder()
    other.dense = torch.nn.Linear(8, 9)
    with pytest.raises(ValueError, match=r"2 tensors .*among them parameter.dense.bias, parameter.dense.weight"):
        TorchEngine(other, ALONE, TRAINING).load_state_dict(state)


def test_float16_gradients_are_scaled_and_clipped_as_if_they_were_not():
    scaled = TorchEngine(ToyEncoder(autocast="float16"), ALONE, TRAINING)
    plain = TorchEngine(ToyEncoder(), ALONE, TRAINING)
    scaled.backward(toy_loss(scaled, 1), synchronise=True)
    plain.backward(toy_loss(plain, 1), synchronise=True)
    gradients = [engine.encoder.dense.weight.grad.clone() for engine in (scaled, plain)]
    torch.testing.assert_close(gradients[0], gradients[1] * 2.0**16)
    torch.testing.assert_close(scaled.step(), plain.step())


def float16_engine():
    encoder = ToyEncoder()
    encoder.config = dataclasses.replace(encoder.config, autocast="float16")
    return TorchEngine(encoder, ALONE, TRAINING)


def test_state_saved_without_float16_begins_with_a_new_scale():
    saved = cloned(TorchEngine(ToyEncoder(), ALONE, TRAINING).state_dict())
    assert saved["values"]["scaler"] == {}
    engine = float16_engine()
    engine.load_state_dict(saved)
    assert engine._scaler.get_scale() == 2.0**16


def test_first_rank_alone_writes_what_all_ranks_have():
    engine = TorchEngine(ToyEncoder(), ALONE, TRAINING)
    train(engine, range(1))
    whole = engine.state_dict()
    engine.process = dataclasses.replace(ALONE, data_rank=1, data_size=2)
    assert whole["tensors"] and engine.state_dict() == {"tensors": {}, "values": whole["values"]}


def test_overflow_under_float16_leaves_the_step_out_and_says_so_once(capsys):
    engine = float16_engine()
    train(engine, range(3))
    before, scale = cloned(engine.state_dict()), engine._scaler.get_scale()
    for _ in range(2):
        engine.backward(toy_loss(engine, 1) * 1e36, synchronise=True)  # times the scale: over the range of float32
        assert engine.step().item() == 0.0
    after = engine.state_dict()
    for name, tensor in before["tensors"].items():
        assert torch.equal(tensor, after["tensors"][name]), name
    assert (engine.steps_done, engine._scaler.get_scale()) == (5, scale / 4)
    assert capsys.readouterr().out.count("overflowed") == 1
    assert train(engine, [7]).item() > 0
    weights = [state["tensors"]["parameter.dense.weight"] for state in (engine.state_dict(), before)]
    assert not torch.equal(*weights)


def test_gradient_that_stays_infinite_under_float16_is_not_hidden():
    engine = float16_engine()
    norms = []
    for _ in range(18):  # the scale begins at 2**16
        engine.backward(toy_loss(engine, 1) * float("inf"), synchronise=True)
        norms.append(engine.step().item())
    assert norms[:16] == [0.0] * 16 and norms[16] != norms[16]
