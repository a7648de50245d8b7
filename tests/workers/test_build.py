"""Fields of mcore that ``parallel.ddp`` and ``optimizer.megatron`` do not take."""

import dataclasses
import re

import pytest

from megarl.workers import build


@pytest.mark.parametrize(
    ("key", "upstream", "refused"),
    [
        ("parallel.ddp", build.DistributedDataParallelConfig, build._DDP_REFUSED),
        ("optimizer.megatron", build.MegatronOptimizerConfig, build._OPTIMIZER_REFUSED),
    ],
)
def test_every_refused_field_is_mcores_and_comes_with_its_reason(key, upstream, refused):
    known = {field.name for field in dataclasses.fields(upstream)}
    assert set(refused) <= known, "mcore has no such field any more"
    for name, reason in refused.items():
        with pytest.raises(ValueError, match=re.escape(f"{key}.{name}: {reason}")):
            build._check(key, {name: True}, upstream, refused)
    build._check(key, dict.fromkeys(known - set(refused), True), upstream, refused)


def test_what_the_trainer_sets_itself_is_refused():
    """Else mcore's constructor would be given the same field twice."""
    own = {"use_distributed_optimizer", "grad_reduce_in_fp32"}
    assert own <= set(build._DDP_REFUSED)
    own = {"optimizer", "lr", "min_lr", "adam_beta1", "adam_beta2", "adam_eps", "weight_decay", "clip_grad", "bf16"}
    assert own | {"params_dtype", "use_distributed_optimizer"} <= set(build._OPTIMIZER_REFUSED)


def test_an_unknown_field_comes_with_the_nearest():
    with pytest.raises(ValueError, match=r"did you mean parallel\.ddp\.overlap_grad_reduce\?"):
        build._check("parallel.ddp", {"overlap_grad_reduction": True}, build.DistributedDataParallelConfig, {})
