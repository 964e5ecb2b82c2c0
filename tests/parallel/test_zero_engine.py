"""What DeepSpeed is told; tests/distributed/test_zero.py trains with it."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from tdro_hpc.config.schema import LoraConfig, ModelConfig, ParallelConfig, TrainingConfig
from tdro_hpc.parallel.deepspeed_setup import import_deepspeed
from tdro_hpc.parallel.process import Process
from tdro_hpc.parallel.zero.engine import BUCKET_ELEMENTS, zero_settings
from tests.reference.toy import ToyEncoder

ALONE = Process(data_rank=0, data_size=1, local_rank=0, device=torch.device("cpu"))
TRAINING = TrainingConfig(steps=20, warmup_steps=0, max_grad_norm=0.7)


def model(**keys):
    return ModelConfig(name="tiny:qwen2", autocast="float32", lora=LoraConfig(enabled=False), **keys)


def settings(zero, *, training=TRAINING, offload=False, trained=None, **keys):
    encoder = ToyEncoder().to(trained or getattr(torch, model(**keys).weights_dtype))
    encoder.config = model(**keys)
    parallel = ParallelConfig(engine="deepspeed", zero=zero, offload=offload)
    found = zero_settings(encoder, ALONE, training, parallel)
    assert json.loads(json.dumps(found)) == found, "DeepSpeed writes its settings as JSON"
    return found


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_clipping_is_always_written_out(zero):
    assert settings(zero)["gradient_clipping"] == 0.7
    assert settings(zero, training=TrainingConfig(max_grad_norm=0))["gradient_clipping"] == 0.0
    assert settings(0)["gradient_clipping"] == 0.0, "the engine clips under ZeRO-0"


def test_bfloat16_gradients_are_summed_in_float32():
    for zero in (1, 2, 3):
        found = settings(zero, weights_dtype="bfloat16")
        assert found["bf16"] == {"enabled": True} and found["data_types"] == {"grad_accum_dtype": "fp32"}
    assert not {"bf16", "data_types"} & settings(2).keys()


def test_float32_adapters_on_bfloat16_weights_are_not_cast_for_the_passes():
    assert "bf16" not in settings(1, weights_dtype="bfloat16", trained=torch.float32)


def test_states_go_to_the_host_where_asked():
    assert settings(2, offload=True)["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert "offload_optimizer" not in settings(2)["zero_optimization"]


def test_bucket_is_no_larger_than_the_gradients_and_holds_the_largest():
    sizes = [p.numel() for p in ToyEncoder().parameters() if p.requires_grad]
    assert settings(2)["zero_optimization"]["reduce_bucket_size"] == sum(sizes) < BUCKET_ELEMENTS


def test_missing_deepspeed_is_said_with_what_to_type(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ValueError, match=r"pip install 'deepspeed>=0.19,<0.20', or set parallel.engine=torch"):
        import_deepspeed("cpu")


def test_deepspeed_on_another_device_is_refused(monkeypatch):
    elsewhere = SimpleNamespace(device_name=lambda: "cuda:0")
    fake = SimpleNamespace(
        ops=SimpleNamespace(__compatible_ops__={}), accelerator=SimpleNamespace(get_accelerator=lambda: elsewhere)
    )
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    monkeypatch.setitem(sys.modules, "deepspeed", fake)
    with pytest.raises(ValueError, match="works on cuda:0 .* Set DS_ACCELERATOR=cpu"):
        import_deepspeed("cpu")
    assert fake.ops.__compatible_ops__ == {"deepspeed_shm_comm": False}
