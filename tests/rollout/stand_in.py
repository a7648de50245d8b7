"""An engine for tests of what surrounds engines. It imports little: each one is a process that somebody waits for."""

import asyncio
import importlib
import os
from types import SimpleNamespace

import numpy as np
import ray


@ray.remote(num_cpus=0, max_concurrency=100)
class Engine:
    """Answers after ``seconds``; ``works`` makes steps meanwhile, ``paused`` stands still by order.

    Without ``seconds`` it is never asked.
    """

    def __init__(self, seconds=None, *, works=True, paused=False, dies=False):
        if dies:
            os._exit(1)
        if seconds is not None:
            importlib.import_module("megarl.rollout.engine")  # what requests are made of: it takes seconds
        self.seconds, self.works, self.paused, self.steps, self.refused = seconds, works, paused, 0, ""

    async def refuse(self, why):
        self.refused = why

    async def ping(self):
        refused, self.refused = self.refused, ""
        return {"memory_gb": {}, "refused": refused}

    async def progress(self):
        self.steps += self.works
        return SimpleNamespace(steps=self.steps, paused=self.paused)

    async def generate(self, request):
        await asyncio.sleep(self.seconds)
        streams = {"tokens": np.int32([5, 6]), "logprobs": np.float32([0, 0]), "weight_versions": np.int32([0, 0])}
        return [SimpleNamespace(**streams, finish_reason="length")] * request.num_samples

    async def shutdown(self): ...
