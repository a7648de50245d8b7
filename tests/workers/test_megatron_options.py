"""Fields of mcore that ``parallel.ddp`` and ``optimizer.megatron`` do not take."""

import dataclasses
import re

import pytest

from megarl.config import RunConfig
from megarl.workers import megatron_options as options


@pytest.mark.parametrize(
    ("key", "upstream", "refused"),
    [
        ("parallel.ddp", options.DistributedDataParallelConfig, options._DDP_REFUSED),
        ("optimizer.megatron", options.MegatronOptimizerConfig, options._OPTIMIZER_REFUSED),
    ],
)
def test_every_refused_field_is_mcores_and_comes_with_its_reason(key, upstream, refused):
    known = {field.name for field in dataclasses.fields(upstream)}
    assert set(refused) <= known, "mcore has no such field any more"
    for name, reason in refused.items():
        with pytest.raises(ValueError, match=re.escape(f"{key}.{name}: {reason}")):
            options._check(key, {name: True}, upstream, refused)
    options._check(key, dict.fromkeys(known - set(refused), True), upstream, refused)


def test_what_the_trainer_sets_itself_is_refused():
    """Else mcore's constructor would be given the same field twice."""
    own = {"use_distributed_optimizer", "grad_reduce_in_fp32"}
    assert own <= set(options._DDP_REFUSED)
    own = {"optimizer", "lr", "min_lr", "adam_beta1", "adam_beta2", "adam_eps", "weight_decay", "clip_grad", "bf16"}
    assert own | {"params_dtype", "use_distributed_optimizer"} <= set(options._OPTIMIZER_REFUSED)


def test_an_unknown_field_comes_with_the_nearest():
    with pytest.raises(ValueError, match=r"did you mean parallel\.ddp\.overlap_grad_reduce\?"):
        options._check("parallel.ddp", {"overlap_grad_reduction": True}, options.DistributedDataParallelConfig, {})


@pytest.mark.parametrize(
    ("section", "given", "message"),
    [
        ("ddp", {"overlap_param_gather": True}, "parallel.ddp.overlap_param_gather=True needs"),
        ("megatron", {"optimizer_cpu_offload": True}, "needs model.dtype=bfloat16"),
        ("megatron", {"use_precision_aware_optimizer": True}, "needs Transformer Engine"),
        ("megatron", {"exp_avg_dtype": "bfloat16"}, "optimizer.megatron.exp_avg_dtype needs"),
        ("megatron", {"exp_avg_dtype": "bf16"}, "optimizer.megatron.exp_avg_dtype='bf16' is not one of"),
    ],
)
def test_what_lacks_its_condition_is_refused(section, given, message):
    config = RunConfig()
    if section == "ddp":
        config.parallel.ddp = given
    else:
        config.optimizer.megatron = given
    with pytest.raises(ValueError, match=re.escape(message)):
        options.ddp_options(config), options.optimizer_options(config, config.optimizer)
