"""Rewards of every temper, loaded by the processes that the tests start."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def length(data_source, solution_str, ground_truth, extra_info=None):
    return len(solution_str)


def process_id(data_source, solution_str, ground_truth, extra_info=None):
    return os.getpid()


def arguments(data_source, solution_str, ground_truth, extra_info=None):
    assert (data_source, ground_truth, extra_info["index"]) == ("geo3k", 3, 5), (data_source, ground_truth, extra_info)
    return {"score": True, "accuracy": 0.5, "parsed": "not a number"}


def moody(data_source, solution_str, ground_truth, extra_info=None):
    """Does what the response says."""
    if solution_str == "raise":
        raise KeyError("no such mood")
    if solution_str == "exit":
        sys.exit(3)
    if solution_str == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if solution_str == "hang":
        time.sleep(3600)
    if solution_str.startswith("hang with child"):
        child = subprocess.Popen(["sleep", "3600"])
        Path(solution_str.split()[-1]).write_text(f"{child.pid} {os.getpid()}")
        time.sleep(3600)
    return {"none": None, "nan": float("nan"), "text": {"score": "high"}, "no score": {"x": 1}}.get(solution_str, 1.0)


async def slow(data_source, solution_str, ground_truth, extra_info=None):
    if solution_str == "hang":
        await asyncio.sleep(3600)
    if solution_str == "block":
        time.sleep(3600)
    if solution_str == "raise":
        raise ValueError("async mood")
    await asyncio.sleep(0.2)
    return len(solution_str)
