"""What the device decides."""

import pytest

from megarl.config import RunConfig
from megarl.experiment import apply_overrides
from megarl.launch.defaults import with_device_defaults
from tests.pretend.architectures import ARCHITECTURES

GB = 10**9
QWEN = ARCHITECTURES["qwen2_5_vl_7b"]()
SPLIT4 = ["trainer.placement=split", "trainer.offload=[]", "trainer.ranks_per_node=4"]


def decided(*overrides: str, gpu_bytes: int | None = 80 * GB) -> tuple[str, bool | None, str, list[str]]:
    config = with_device_defaults(apply_overrides(RunConfig(), list(overrides)), QWEN, gpu_bytes=gpu_bytes)
    model = config.model
    return model.dtype, config.parallel.sequence_parallel, model.recompute, list(model.recompute_modules)


def test_undecided_is_what_a_cpu_has():
    config = RunConfig()
    assert (config.model.dtype, config.model.recompute, config.parallel.sequence_parallel) == ("auto", "auto", None)
    assert config.model.params_dtype == "float32"
    decided_config = with_device_defaults(config, QWEN, gpu_bytes=None)
    assert decided_config.model.params_dtype == decided_config.model.dtype == "float32"
    assert decided(*SPLIT4, "parallel.tensor_model_parallel_size=2", gpu_bytes=None) == (
        "float32",
        False,
        "none",
        ["core_attn"],
    )


@pytest.mark.parametrize(
    ("tensor", "gigabytes", "recompute"),
    [(2, 80, "full"), (2, 96, "selective"), (4, 80, "none"), (4, 70, "selective"), (4, 48, "full"), (4, 24, "full")],
)
def test_gpus_get_bfloat16_and_the_fastest_way_that_fits(tensor, gigabytes, recompute):
    found = decided(*SPLIT4, f"parallel.tensor_model_parallel_size={tensor}", gpu_bytes=gigabytes * GB)
    modules = ["core_attn", "layernorm", "mlp"] if recompute == "selective" else ["core_attn"]
    assert found == ("bfloat16", True, recompute, modules)


def test_one_tensor_parallel_rank_has_no_sequence_to_share():
    assert decided(*SPLIT4, gpu_bytes=200 * GB)[:2] == ("bfloat16", False)


def test_what_is_asked_for_stays():
    asked = ["model.dtype=float32", "model.recompute=selective", "parallel.sequence_parallel=false"]
    found = decided(*SPLIT4, *asked, "parallel.tensor_model_parallel_size=2")
    assert found == ("float32", False, "selective", ["core_attn"])
    assert decided("model.dtype=bfloat16", gpu_bytes=None)[0] == "bfloat16"


def test_offloading_an_optimizer_without_a_gpu_is_refused():
    config = apply_overrides(RunConfig(), ["optimizer.megatron.optimizer_cpu_offload=True"])
    with pytest.raises(ValueError, match=r"optimizer\.megatron\.optimizer_cpu_offload=True relieves a GPU"):
        with_device_defaults(config, QWEN, gpu_bytes=None)
