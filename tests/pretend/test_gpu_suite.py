"""Bodies of the GPU suite's tests on the pretended device: what no GPU has run yet at least runs, and passes."""

import pytest

from tests.pretend import device, jobs

pytestmark = pytest.mark.skipif(device.reason_to_skip() is not None, reason=str(device.reason_to_skip()))

CODE = """
import traceback
import torch
from tests.pretend import te_stub
te_stub.install()
from tests.pretend.mode import Pretend

answer = {}
with Pretend():
    import megarl.parallel
    from tests.pretend import patches
    patches.megatron()
    import torch.distributed as dist
    from tests.gpu import test_attention as attention, test_kernels as kernels

    kernels.VOCAB["cuda"] = 500
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    bodies = {
        "sdpa": lambda: attention.test_sdpa("cuda", 72, 14, 2, True),
        "varlen, causal": lambda: attention.test_varlen(80, 14, 2, True),
        "varlen": lambda: attention.test_varlen(64, 8, 8, False),
        "context parallel": lambda: attention.test_varlen_of_a_context_parallel_rank(1),
        "transformer engine": lambda: attention.test_transformer_engine(128, 14, 2, True),
        "head": lambda: kernels.test_linear_logprob("cuda"),
        "checksum": lambda: kernels.test_a_checksum_is_the_same_everywhere("cuda", torch.bfloat16),
        "experts": lambda: kernels.test_experts("cuda", lambda device, function, size, *args: [function(*args)]),
    }
    for name, body in bodies.items():
        try:
            body()
            answer[name] = "passed"
        except Exception:
            answer[name] = traceback.format_exc()[-1500:]
"""


def test_bodies_pass():
    answer = jobs.evaluate(CODE)
    assert len(answer) == 8
    for name, result in answer.items():
        assert result == "passed", f"{name}: {result}"
