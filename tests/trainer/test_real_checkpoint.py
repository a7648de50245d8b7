"""A published checkpoint in bfloat16 with its engine: as far apart as two attention kernels of transformers are."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megarl.observability.rollouts import read_rollouts
from megarl.trainer.agreement import Difference
from tests.smollm2 import write_smollm2
from tests.trainer.commands import metrics, run

pytestmark = pytest.mark.slow


@torch.no_grad()
def response_logprobs(directory: Path, rows: list[dict], attention: str) -> np.ndarray:
    """transformers' log-probs [N] in bfloat16 of the responses in ``rows``, one after the other."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, attn_implementation=attention)
    found = []
    for row in rows:
        prompt = tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True, return_dict=True)
        response = tokenizer(row["response"], add_special_tokens=False)["input_ids"]
        tokens = torch.tensor([prompt["input_ids"] + response])
        hidden = model.model(tokens).last_hidden_state[0, :-1]
        logprobs = (hidden.float() @ model.lm_head.weight.float().T).log_softmax(-1)
        found.append(logprobs.gather(1, tokens[0, 1:, None])[-len(response) :, 0])
    return torch.cat(found).numpy()


def test_smollm2_trains_in_bfloat16_with_its_engine(tmp_path, monkeypatch):
    write_smollm2(tmp_path / "model", torch.bfloat16)
    monkeypatch.setenv("PLACE", str(tmp_path))
    text = run(tmp_path / "log", "train", Path(__file__).with_name("smollm2.py"))
    assert "differ on the rollouts" not in text
    rows = metrics(tmp_path / "run")
    assert [step for step in rows if step] == [1, 2, 3]
    responses = read_rollouts(tmp_path / "run/rollouts/step_000001.jsonl")
    assert len(responses) == 16
    eager, sdpa = (response_logprobs(tmp_path / "model", responses, kind) for kind in ("eager", "sdpa"))
    kernels = Difference.between(eager, sdpa)
    for step in (1, 2, 3):
        row = rows[step]
        found = {
            "mean |p - p'|": row["training/rollout_probs_diff_mean"],
            "mean |log p - log p'|": row["training/rollout_logprobs_diff_mean"],
            "max |log p - log p'|": row["training/rollout_logprobs_diff_max"],
            "canary mean |p - p'|": row["sync/canary_probs_diff_mean"],
            "canary max |log p - log p'|": row["sync/canary_abs_diff"],
        }
        print(f"step {step}:", json.dumps({name: round(value, 5) for name, value in found.items()}))
        assert row["actor/grad_norm"] > 0
        assert row["sync/verified_tensors"] == row["sync/tensors"] == 272
        assert 0 < row["training/rollout_probs_diff_mean"] < 2 * kernels.mean
        assert row["training/rollout_logprobs_diff_max"] < 3 * kernels.largest
    print("eager, sdpa:", kernels, "mean |log p - log p'|", float(np.abs(eager - sdpa).mean()))
