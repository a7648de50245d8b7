"""Payloads of weights open on the GPU that made them and on no other, by SGLang's own deserialiser."""

import pytest

from tests.pretend import device, jobs

pytestmark = pytest.mark.skipif(device.reason_to_skip() is not None, reason=str(device.reason_to_skip()))

CODE = """
from tests.pretend.ipc import open_payload, share

def opened(payload, visible):
    try:
        return open_payload(payload, visible)
    except Exception as error:
        return f"{type(error).__name__}: {error}"

payloads = share("GPU-a", ["model.norm.weight", "lm_head.weight"], 2)
answer = {
    "alone": [opened(payload, ["GPU-a"]) for payload in payloads],
    "among others": opened(payloads[0], ["GPU-c", "GPU-b", "GPU-a"]),
    "elsewhere": opened(payloads[0], ["GPU-b"]),
    "again": opened(share("GPU-b", ["model.norm.weight"], 1)[0], ["GPU-a", "GPU-b"]),
}
"""


def test_a_payload_opens_on_its_own_gpu_only():
    answer = jobs.evaluate(CODE)
    assert answer["alone"] == [0, 0]
    assert answer["among others"] == 2
    assert answer["elsewhere"] == "Exception: Invalid device_uuid=GPU-a"
    assert answer["again"] == 1
