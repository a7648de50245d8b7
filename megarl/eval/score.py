"""Log-probs of given responses under a model on Megatron-Core: what `megarl score` does."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megarl.checkpoint.manifest import read_manifest
from megarl.config import DataConfig, RunConfig
from megarl.data.datasets import Row, read_rows
from megarl.data.packing import Packing, assign_to_bins, by_sample, pack_assigned
from megarl.data.processors import Processor, load_processor
from megarl.experiment import load_experiment
from megarl.types import Placement, Sample
from megarl.workers.group import WorkerGroup

ROWS_AT_A_TIME = 256


def score_file(
    config: RunConfig,
    placement: Placement,
    checkpoint: Path,
    data: Path,
    out: Path,
    *,
    temperature: float,
    ban: bool,
) -> int:
    """Write ``data``'s rows to ``out`` with ``prompt_ids``, ``response_ids`` and ``logprobs``; the number of rows.

    ``checkpoint`` is a Hugging Face directory or a megarl checkpoint. ``out`` appears when it is complete.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"--temperature={temperature} must be positive")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"--out={out}: no directory {out.parent}")
    is_megatron = (checkpoint / "manifest.json").is_file()
    hf_dir = checkpoint / "hf" if is_megatron else checkpoint
    config = replace(config, model=replace(config.model, path=str(hf_dir)))
    if is_megatron and "adapters" in read_manifest(checkpoint).contents:  # the rest is where they were trained
        trained = load_experiment(checkpoint / "config.yaml").model
        config = replace(config, model=replace(config.model, path=trained.path, lora=trained.lora))
    processor = load_processor(hf_dir, config)
    packing = Packing.of(config, processor)
    rows = read_rows([data])
    if not rows:
        raise ValueError(f"{data}: no rows")
    samples = [to_sample(row, processor) for row in rows]
    workers = WorkerGroup(config, placement)
    try:
        workers.call("build", str(hf_dir), trainable=False, weights=not is_megatron)
        if is_megatron:
            workers.call("load_checkpoint", str(checkpoint))
        partial = out.with_name(out.name + ".partial")
        with partial.open("w") as file, tqdm(total=len(rows), desc="score", unit="row") as progress:
            for start in range(0, len(rows), ROWS_AT_A_TIME):
                chunk = samples[start : start + ROWS_AT_A_TIME]
                logprobs = score(workers, chunk, packing, temperature=temperature, ban=ban)
                for row, sample, values in zip(rows[start:], chunk, logprobs, strict=False):
                    file.write(json.dumps(row.values | scored(sample, values)) + "\n")
                progress.update(len(chunk))
        os.replace(partial, out)
    finally:
        workers.shutdown()
    return len(rows)


def to_sample(row: Row, processor: Processor) -> Sample:
    """The row's response as a trajectory: its words and the end of the response, or its ids as they are."""
    given = [key for key in ("response", "response_ids") if key in row.values]
    if len(given) != 1:
        raise ValueError(f"{row.where}: a row has either a response or response_ids")
    prompt = row.prompt(row.where, "score", DataConfig(target_key=given[0]))
    words = given == ["response"]
    if words != isinstance(prompt.target, str) or not (words or isinstance(prompt.target, list)):
        raise ValueError(f"{row.where}: {given[0]} is {type(prompt.target).__name__}")
    encoded = processor.encode(prompt)
    ids = prompt.target if given == ["response_ids"] else processor.encode_response(prompt.target)
    vocab_size = len(processor.tokenizer)
    if not len(ids) or not all(isinstance(i, int | np.integer) and 0 <= i < vocab_size for i in ids):
        raise ValueError(f"{row.where}: response_ids must be a list of ids from 0 to {vocab_size - 1}, at least one")
    for token in processor.media_token_ids:
        if token in ids:
            raise ValueError(f"{row.where}: a response shows no image or video, but has the token {token}")
    tokens = np.concatenate([encoded.tokens, np.asarray(ids)]).astype(np.int32)
    responded = np.arange(len(tokens)) >= len(encoded.tokens)
    return Sample(
        prompt=prompt,
        group_id=0,
        loss_mask=responded,
        rollout_logprobs=np.zeros(len(tokens), np.float32),
        tokens=tokens,
        media=encoded.media,
    )


def score(
    workers: WorkerGroup, samples: list[Sample], packing: Packing, *, temperature: float, ban: bool
) -> list[np.ndarray]:
    """Log-probs of the actions of each sample, in the order of ``samples``."""
    bins = assign_to_bins(samples, packing, workers.data_parallel_size)
    packed = pack_assigned(samples, bins, packing)
    return by_sample(samples, bins, workers.logprobs(packed, temperature=temperature, ban=ban))


def scored(sample: Sample, logprobs: np.ndarray) -> dict[str, Any]:
    """What a row gains."""
    return {
        "prompt_ids": sample.tokens[~sample.loss_mask].tolist(),
        "response_ids": sample.tokens[sample.loss_mask].tolist(),
        "logprobs": [float(value) for value in logprobs],
    }
