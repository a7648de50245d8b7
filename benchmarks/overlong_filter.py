"""How long it takes to find the over-long prompts of a data set: when a run starts, when it starts again, and against
decoding every image.

    python benchmarks/overlong_filter.py [ROWS]

Writes JPEGs of 640 x 480 and a JSONL file that shows one in every row (10,000 rows unless told otherwise; time is
proportional), and measures them as a run does before its first step, in one process; the second time it reads what the
first has kept. "Row by row" is what a run does with the rows that it draws. The peer does what verl's and EasyR1's
``filter_overlong_prompts`` do, transformers' processor on every row, on the first 200 rows. CPU seconds, scaled to
100,000 rows. Writes benchmarks/results/overlong_filter_<cores>_cores.json.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples import tiny_models
from megarl.config import DataConfig, RunConfig
from megarl.data.lengths import row_lengths
from megarl.data.processors import load_processor
from megarl.tasks.dataset import Dataset

from transformers import AutoProcessor  # isort: skip  after torchvision_cpu

RESULTS = Path(__file__).parent / "results"
SCALE = 100_000
NUM_IMAGES, NUM_PEER_ROWS = 200, 200
QUESTION = "<image>What digits are in this image? I need the digits in a list sorted from lowest to highest. " * 2


def write_data(folder: Path, rows: int) -> Path:
    random = np.random.default_rng(0)
    for number in range(NUM_IMAGES):
        pixels = random.integers(0, 255, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((640, 480)).save(folder / f"{number}.jpg", quality=90)
    path = folder / "train.jsonl"
    question = QUESTION.replace("<image>", "", 1).replace("<image>", "")
    with path.open("w") as file:
        for row in range(rows):
            line = {"prompt": "<image>" + question * (1 + row % 3), "images": [f"{row % NUM_IMAGES}.jpg"], "answer": 1}
            file.write(json.dumps(line) + "\n")
    return path


def seconds_per_row(function: Callable[[int], object], rows: int) -> float:
    function(0)
    start = time.process_time()
    for row in range(rows):
        function(row)
    return (time.process_time() - start) / rows


def main(arguments: list[str]) -> None:
    rows = int(arguments[0]) if arguments else 10_000
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny_models.qwen2_5_vl(folder / "model")
        data = DataConfig(train_files=[str(write_data(folder, rows))])
        start = time.process_time()
        task = Dataset("set", data)
        task.num_prompts("train")
        reading = (time.process_time() - start) / rows
        processor = load_processor(folder / "model", RunConfig(data=data))
        peer = AutoProcessor.from_pretrained(folder / "model")

        def decode_all(row: int) -> int:
            prompt = task.prompt("train", row)
            text = peer.apply_chat_template(prompt.messages, tokenize=False, add_generation_prompt=True)
            images = [Image.open(BytesIO(image)).convert("RGB") for image in prompt.images]
            return len(peer(text=[text], images=images)["input_ids"][0])

        def measure() -> float:
            start = time.process_time()
            lengths = row_lengths(task, processor, processor, data, folder=folder / "kept")
            elapsed = (time.process_time() - start) / rows
            for row in range(20):
                assert decode_all(row) == len(processor.lay_out(task.prompt("train", row)).tokens) == lengths[row]
            return elapsed

        results = {
            "read the rows": reading,
            "megarl, first start": measure(),
            "megarl, second start": measure(),
            "megarl, row by row": seconds_per_row(
                lambda row: processor.lay_out(task.prompt("train", row)), min(rows, 2000)
            ),
            "megarl, images checked": seconds_per_row(
                lambda row: processor.encode(task.prompt("train", row)), min(rows, 1000)
            ),
            "transformers' processor": seconds_per_row(decode_all, min(rows, NUM_PEER_ROWS)),
        }
    for name, seconds in results.items():
        print(f"{name:28s}{1e6 * seconds:10.2f} us a row{SCALE * seconds:10.1f} s for {SCALE:,} rows")
    ratio = results["transformers' processor"] / results["megarl, first start"]
    print(f"measuring from headers is {ratio:.0f} times as fast as transformers' processor")
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"overlong_filter_{os.cpu_count()}_cores.json"
    path.write_text(json.dumps({"unit": "CPU seconds a row", "rows": rows, "seconds": results}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
