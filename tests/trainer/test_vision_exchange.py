"""Images that lie unevenly over data-parallel ranks, through the whole program: ranks of a pipeline share them and say
what one rank says."""

import json
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from tests.trainer.commands import EXPERIMENT, metrics, run

pytestmark = pytest.mark.slow

ONE = ["parallel.tensor_model_parallel_size=1", "trainer.ranks_per_node=1"]
PP2_DP2 = [
    "parallel.tensor_model_parallel_size=1",
    "parallel.pipeline_model_parallel_size=2",
    "parallel.pipeline_layout=[1,2]",
    "trainer.ranks_per_node=4",
]
# (height, width) of each row's images; the rows of a step are four, the first has nearly all there is to see
ROWS = [
    [(140, 112), (112, 112), (84, 140), (112, 84)],
    [],
    [(28, 28)],
    [],
    [(140, 140), (112, 140)],
    [],
    [],
    [],
]


def write_rows(folder):
    """A file of rows with images of noise, of which the last row shows the first row's first again."""
    random, rows = np.random.default_rng(0), []
    for number, sizes in enumerate(ROWS):
        names = [f"{number}_{i}.png" for i in range(len(sizes))]
        for name, (height, width) in zip(names, sizes, strict=True):
            out = BytesIO()
            Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(out, "PNG")
            (folder / name).write_bytes(out.getvalue())
        names = names if number < len(ROWS) - 1 else ["0_0.png"]
        words = "<image>" * len(names) + "What digits are in this image?"
        answer = ",".join(map(str, random.integers(0, 10, 1 + number)))
        rows.append({"prompt": [{"role": "user", "content": words}], "images": names, "target": answer})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scored = [{**row, "response": row["target"]} for row in rows]
    (folder / "scored.jsonl").write_text("".join(json.dumps(row) + "\n" for row in scored))


def test_a_pipeline_of_two_data_parallel_ranks_says_what_one_rank_says(tmp_path):
    write_rows(tmp_path)
    shared = [
        f"model.path={tmp_path / 'tiny'}",
        "tasks={digits: {path: 'megarl.tasks.dataset:Dataset'}}",
        f"data.train_files=[{tmp_path / 'rows.jsonl'}]",
        f"data.val_files=[{tmp_path / 'rows.jsonl'}]",
        "data.shuffle=False",
        "data.prompts_per_step=4",
        "data.max_prompt_length=256",
        "algorithm.policy_loss=sft",
        "algorithm.kl_coef=0",
        "trainer.num_steps=4",
        "trainer.eval_prompts=8",
        "trainer.max_tokens_per_microbatch=128",
        "checkpoint.save_every=0",
    ]
    runs = {}
    for name, layout in (("one", ONE), ("pp2_dp2", PP2_DP2)):
        run(tmp_path / f"{name}.log", "sft", EXPERIMENT, f"trainer.run_dir={tmp_path / name}", *layout, *shared)
        runs[name] = metrics(tmp_path / name)
    assert list(runs["one"]) == list(runs["pp2_dp2"]) == [0, 1, 2, 3, 4]
    assert runs["one"][4]["val-core/loss"] < runs["one"][0]["val-core/loss"]
    for step, row in runs["one"].items():
        for name in row.keys() & {"train/loss", "actor/grad_norm", "val-core/loss"}:
            assert runs["pp2_dp2"][step][name] == pytest.approx(row[name], rel=1e-5), (step, name)
    for step in (1, 3):  # the four large images of a row are more than either of the two ranks encodes
        assert runs["pp2_dp2"][step]["vision/patches"] == runs["one"][step]["vision/patches"]
        assert runs["pp2_dp2"][step]["vision/patch_imbalance"] < 1.5
    scores = {}
    checkpoint = tmp_path / "pp2_dp2/checkpoints/step_000004"
    for name, layout in (("one", ONE), ("pp2_dp2", PP2_DP2)):
        out = tmp_path / f"{name}.jsonl"
        options = ["--out", out, *layout, "trainer.max_tokens_per_microbatch=128"]
        run(tmp_path / f"score_{name}.log", "score", checkpoint, tmp_path / "scored.jsonl", *options)
        scores[name] = [json.loads(line)["logprobs"] for line in out.read_text().splitlines()]
    for ours, expected in zip(scores["pp2_dp2"], scores["one"], strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-5, rtol=0)
