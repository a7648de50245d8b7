"""The page and the files of rollouts, of whole, partial and broken runs."""

import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from megarl.config import RunConfig, TaskConfig
from megarl.experiment import to_yaml
from megarl.observability.charts import Series, line_chart, nice_ticks, smooth, stacked_bars
from megarl.observability.numbers import format_number
from megarl.observability.report import write_report
from megarl.observability.rollouts import RolloutWriter, read_rollouts, rollout_steps
from megarl.types import Media, Prompt, Sample


def encoded(kind: str, size: int = 28) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def sample(group: int, response: str, reward: float, image: bytes, advantage: float | None = None) -> Sample:
    mask = np.array([False, False, True, True])
    text = {"type": "text", "text": "Which <digit>?"}
    return Sample(
        prompt=Prompt(
            f"digits/train/{group}", "digits", [{"role": "user", "content": [{"type": "image"}, text]}], [image], 7
        ),
        group_id=group,
        loss_mask=mask,
        rollout_logprobs=np.zeros(4, np.float32),
        tokens=np.zeros(4, np.int32),
        media=Media([image], np.array([[1, 2, 2]]), np.array([[28, 28]]), np.zeros(1)),
        response=response,
        reward=reward,
        rewards={"score": reward, "format": 0.1},
        advantages=None if advantage is None else np.where(mask, advantage, 0).astype(np.float32),
    )


def test_rollouts_are_one_line_a_sample_and_one_file_an_image(tmp_path):
    png, jpeg = encoded("PNG"), encoded("JPEG")
    samples = [sample(0, "a", 1.0, png, 0.5), sample(0, "b", 0.0, png, -0.5), sample(1, "c", 0.0, jpeg)]
    path = RolloutWriter(tmp_path, bytes.upper).write(10, samples)
    assert path == tmp_path / "rollouts" / "step_000010.jsonl"
    assert rollout_steps(tmp_path) == {10: path}
    rows = read_rollouts(path)
    assert [(r["response"], r["reward"], r["advantage"]) for r in rows] == [
        ("a", 1, 0.5),
        ("b", 0, -0.5),
        ("c", 0, None),
    ]
    assert rows[0]["messages"] == [{"role": "user", "content": "<image>Which <digit>?"}]
    assert (rows[0]["prompt_length"], rows[0]["response_length"]) == (2, 2)
    files = sorted((tmp_path / "rollouts" / "images").iterdir())
    assert sorted(file.suffix for file in files) == [".jpg", ".png"]
    assert {file.read_bytes() for file in files} == {png, jpeg}


def test_of_a_video_the_first_frame_is_kept(tmp_path):
    shown = sample(0, "a", 1.0, b"video")
    still = sample(1, "b", 1.0, b"video")
    shown.media.seconds = np.ones(1)
    path = RolloutWriter(tmp_path, bytes.upper).write(1, [shown, still])
    (name,), (other,) = (row["images"] for row in read_rollouts(path))
    images = tmp_path / "rollouts" / "images"
    assert (images / name).read_bytes() == b"VIDEO"
    assert name.endswith(".png")
    assert (images / other).read_bytes() == b"video"


def make_run(path, steps: int):
    config = RunConfig(name="a <b>", tasks={"digits": TaskConfig(path="x:Y")})
    (path / "config.yaml").write_text(to_yaml(config))
    rows = [
        {
            "step": s,
            "critic/score/mean": s / steps,
            "actor/entropy": float("nan") if s == 2 else 1.0,
            "training/rollout_probs_diff_max": 2e-6,
            "timing_s/gen": 2.0,
            "timing_s/step": 3.0,
            **({"val-core/digits/exact_match": 0.1 + 0.8 * (s > 1)} if s in (1, steps) else {}),
        }
        for s in range(1, steps + 1)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_page_holds_curves_rollouts_and_nothing_from_outside(tmp_path):
    make_run(tmp_path, 30)
    writer = RolloutWriter(tmp_path, bytes.upper)
    for step in (1, 10, 15, 20, 30):
        writer.write(step, [sample(0, f"<b>step {step}\x07", 1.0, encoded("PNG"), 0.5)])
    html = write_report(tmp_path).read_text()
    assert "<h1>a &lt;b&gt;</h1>" in html
    assert [int(s) for s in re.findall(r"Rollouts of step (\d+)", html)] == [1, 15, 30]
    assert "&lt;b&gt;step 15\\x07" in html
    assert html.count('src="data:image/png;base64,') == 3
    assert not re.findall(r'(?:src|href)="(?!data:)', html)
    assert "url(" not in html
    for title in ("Reward", "Held out", "Entropy", "Rollout against trainer", "Time of a step"):
        assert f"<h3>{title} " in html
    assert re.search(r"0\.1 →</s> 0\.9</b><span>held out: digits/exact_match", html)
    assert Image.open(tmp_path / "reward.png").width > 500


def test_what_an_expert_wrote_is_marked(tmp_path):
    make_run(tmp_path, 1)
    own, hinted = sample(0, "a", 1.0, encoded("PNG")), sample(0, "b", 0.5, encoded("PNG"))
    hinted.expert_mask = hinted.loss_mask.copy()
    path = RolloutWriter(tmp_path, bytes.upper).write(1, [own, hinted])
    expected = [0, hinted.response_length]
    assert [row["expert_length"] for row in read_rollouts(path)] == expected != [0, 0]
    assert write_report(tmp_path).read_text().count("of an expert</i>") == 1


def test_a_large_image_is_made_smaller(tmp_path):
    make_run(tmp_path, 1)
    RolloutWriter(tmp_path, bytes.upper).write(1, [sample(0, "a", 1.0, encoded("PNG", 1200))])
    page = write_report(tmp_path)
    assert page.stat().st_size < 1_000_000
    assert "1200 × 1200 pixels" in page.read_text()


def test_a_run_without_anything_still_has_a_page(tmp_path):
    (tmp_path / "config.yaml").write_text("name: a\n")
    assert "No step has been recorded yet." in write_report(tmp_path).read_text()


def test_one_step_and_half_a_line(tmp_path):
    make_run(tmp_path, 1)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "crit')
    html = write_report(tmp_path).read_text()
    assert "1 line of metrics.jsonl could not be read" in html
    assert "<circle" in html


def test_a_missing_run_directory_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="not a run directory"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_smoothing_keeps_a_constant_and_the_ends_of_a_line():
    assert all(y == pytest.approx(3.0) for _, y in smooth([(x, 3.0) for x in range(50)]))
    line = smooth([(x, float(x)) for x in range(100)])
    assert line[50][1] == pytest.approx(50)
    assert 0 <= line[0][1] < 4


def test_ticks_are_round_and_inside():
    assert nice_ticks(0, 1) == [0, 0.25, 0.5, 0.75, 1]
    assert nice_ticks(1, 120, 5) == [25, 50, 75, 100]
    assert nice_ticks(0, 3e-7, 3) == pytest.approx([0, 1e-7, 2e-7, 3e-7])


def test_a_chart_of_nothing_is_empty_and_of_a_constant_is_not():
    assert line_chart([Series("a", [(1, float("nan"))])]) == ""
    assert stacked_bars([Series("a", [])]) == ""
    assert "polyline" in line_chart([Series("a", [(1, 0.0), (2, 0.0)])])
    assert "rect" in stacked_bars([Series(str(i), [(1, 0.0)]) for i in range(12)])


def test_bars_are_binned_without_losing_time():
    chart = stacked_bars([Series("gen", [(s, 2.0) for s in range(1, 601)])], num_bars=60)
    assert chart.count("<rect") == 60


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (12.0, "12"),
        (0.51234, "0.5123"),
        (1e-4, "1e-4"),
        (1.25e-6, "1.25e-6"),
        (2.5e7, "2.5e7"),
        (float("nan"), "nan"),
    ],
)
def test_numbers_keep_the_digits_that_matter(value, text):
    assert format_number(value) == text
