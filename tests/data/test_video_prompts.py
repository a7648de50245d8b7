"""Videos in prompts, of every Qwen-VL generation: ids, grids and pixels equal transformers', positions the models'."""

import numpy as np
import pytest
import torch
import transformers
from transformers.video_utils import VideoMetadata

from megarl.config import DataConfig, RunConfig
from megarl.data.processors import load_processor
from megarl.types import Media, Prompt
from tests.data.test_videos import encode, frames, png

GENERATIONS = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
CLASSES = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}
IMAGE, VIDEO = {"type": "image"}, {"type": "video"}


def ask(*content: dict | str, images=(), videos=()) -> Prompt:
    parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    message = {"role": "user", "content": parts}
    return Prompt("clips/train/3", "clips", [message], images=[*images], videos=[*videos])


CLIP = encode("GIF", frames())


def load(path, **data):
    return load_processor(path, RunConfig(data=DataConfig(**data)))


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("fps", [2.0, 3.0])
def test_ids_grids_and_pixels_equal_hugging_face(generations, generation, fps):
    processor = load(generations[generation], video_fps=fps)
    reference = transformers.AutoProcessor.from_pretrained(generations[generation])
    first, picture, second = frames(9, 60, 90), frames(1, 40, 75, seed=1)[0], frames(23, 35, 200, seed=2)
    prompt = ask(
        "Compare",
        VIDEO,
        "with",
        IMAGE,
        VIDEO,
        "What?",
        images=[png(picture)],
        videos=[encode("WEBP", first), encode("packed", second, 100)],
    )
    encoded = processor.encode(prompt)
    expected = reference(
        text=[reference.apply_chat_template(prompt.messages, tokenize=False, add_generation_prompt=True)],
        images=[picture],
        videos=[np.stack(first), np.stack(second)],
        video_metadata=[VideoMetadata(9, fps=4.0), VideoMetadata(23, fps=10.0)],
        do_sample_frames=True,
        fps=fps,
        return_tensors="pt",
    )
    assert encoded.tokens.tolist() == expected["input_ids"][0].tolist()
    assert encoded.media.grids[[0, 2]].tolist() == expected["video_grid_thw"].tolist()
    assert encoded.media.grids[[1]].tolist() == expected["image_grid_thw"].tolist()
    assert encoded.media.is_video.tolist() == [True, False, True]
    assert encoded.media.sizes.tolist() == [[60, 90], [40, 75], [35, 200]]
    if "second_per_grid_ts" in expected:
        np.testing.assert_allclose(encoded.media.seconds[[0, 2]], expected["second_per_grid_ts"], rtol=1e-6)
    pixels = processor.pixel_values(encoded.media).split(encoded.media.grids.prod(axis=1).tolist())
    assert torch.equal(torch.cat([pixels[0], pixels[2]]), expected["pixel_values_videos"])
    for tensor, name in ((processor.engine_inputs, "pixel_values"), (processor.engine_videos, "pixel_values_videos")):
        (inputs,) = tensor(encoded.media)
        assert inputs["format"] == "processor_output"
        assert torch.equal(inputs[name], pixels[1] if name == "pixel_values" else expected[name])
        assert ("video_second_per_grid" in inputs) == (generation == "qwen2_5_vl")


def hf_positions(processor, generation, tokens, media):
    ids = {key: value for key, value in processor.config.to_dict().items() if key.endswith("_token_id")}
    vision = {"tokens_per_second": processor.tokens_per_second} if processor.tokens_per_second else {}
    config = getattr(transformers, f"{CLASSES[generation]}Config")(vision_config=vision, **ids)
    with torch.device("meta"):
        model = getattr(transformers, f"{CLASSES[generation]}Model")(config)
    tokens, grids = torch.tensor(tokens).long()[None], torch.tensor(media.grids)
    video = torch.tensor(media.is_video)
    types = (tokens == processor.image_token_id).int() + 2 * (tokens == processor.video_token_id).int()
    seconds = {"second_per_grid_ts": torch.tensor(media.seconds)[video]} if generation == "qwen2_5_vl" else {}
    positions, _ = model.get_rope_index(
        tokens, types, image_grid_thw=grids[~video], video_grid_thw=grids[video], **seconds
    )
    return positions[:, 0]


@pytest.mark.parametrize("generation", GENERATIONS)
def test_position_ids_equal_hugging_face_where_a_video_is_wider_than_long(generations, generation):
    """See ``QwenVLProcessor.position_ids`` for the rest."""
    processor = load(generations[generation], video_fps=2.0)
    prompt = ask(
        VIDEO,
        "and",
        IMAGE,
        "and",
        VIDEO,
        "What?",
        images=[png(frames(1, 40, 75)[0])],
        videos=[encode("WEBP", frames(4, 30, 300), 500), encode("packed", frames(6, 35, 300), 500)],
    )
    encoded = processor.encode(prompt)
    tokens = np.concatenate([encoded.tokens, processor.encode_response("1,2,3")])
    ours = processor.position_ids(tokens, encoded.media)
    assert ours.tolist() == hf_positions(processor, generation, tokens, encoded.media).tolist()
    assert encoded.media.seconds.tolist() == [1.0, 0.0, 1.0]


def clip(grid: list[int], seconds: float) -> Media:
    return Media([b""], np.array([grid]), np.zeros((1, 2), np.int64), np.array([seconds], np.float32))


def test_position_ids_by_hand(generations):
    processors = {generation: load(path) for generation, path in generations.items()}
    video = processors["qwen2_vl"].video_token_id
    tokens = np.array([0, *[video] * 3, 0, 0])
    # three patches in time of one token each, half a second apart
    assert processors["qwen2_vl"].position_ids(tokens, clip([3, 2, 2], 0.5)).tolist() == [
        [0, 1, 2, 3, 4, 5],
        [0, 1, 1, 1, 4, 5],
        [0, 1, 1, 1, 4, 5],
    ]
    # four positions a second
    assert processors["qwen2_5_vl"].position_ids(tokens, clip([3, 2, 2], 0.6)).tolist() == [
        [0, 1, 3, 5, 6, 7],
        [0, 1, 1, 1, 6, 7],
        [0, 1, 1, 1, 6, 7],
    ]
    tokens = np.array([0, video, 0, video, 0, video, 0])
    assert processors["qwen3_vl"].position_ids(tokens, clip([3, 2, 2], 0.5)).tolist() == [list(range(7))] * 3
    with pytest.raises(ValueError, match="3 image and video tokens for grids of 2 merged patches"):
        processors["qwen3_vl"].position_ids(tokens, clip([2, 2, 2], 0.5))


def test_a_long_video_is_sampled_more_thinly(generations):
    for generation, path in generations.items():
        data = encode("packed", frames(64, 30, 30), 100)
        assert load(path, video_fps=5.0).encode(ask(VIDEO, videos=[data])).media.grids[0][0] == 16
        few = load(path, video_fps=5.0, max_video_frames=6).encode(ask(VIDEO, videos=[data])).media
        assert (few.grids[0][0], few.seconds[0]) == (3, pytest.approx(2 * 6.4 / 6)), generation
        assert len(load(path, max_video_frames=6).pixel_values(few)) == few.num_patches


@pytest.mark.parametrize("generation", GENERATIONS)
def test_no_frame_behind_the_end_is_asked_for(generations, generation):
    processor = load(generations[generation], video_fps=2.0)  # 14 of 17: transformers' Qwen2-VL names 15, the last 17
    media = processor.encode(ask(VIDEO, videos=[encode("packed", frames(17, 30, 30), 412)])).media
    assert media.grids[0][0] == 7
    assert len(processor.pixel_values(media)) == media.num_patches


@pytest.mark.parametrize("generation", GENERATIONS)
def test_short_videos(generations, generation):
    processor = load(generations[generation])
    for count in (1, 2, 3):
        encoded = processor.encode(ask(VIDEO, "What?", videos=[encode("GIF", frames(count, 30, 30))]))
        assert encoded.media.grids[0][0] == (1 if count < 4 and generation != "qwen3_vl" else -(-count // 2))
        assert len(processor.pixel_values(encoded.media)) == encoded.media.num_patches


def test_the_same_bytes_may_be_an_image_and_a_video(generations):
    processor = load(generations["qwen2_5_vl"])
    data = encode("GIF", frames(8, 30, 30), 250)
    media = processor.encode(ask(IMAGE, VIDEO, images=[data], videos=[data])).media
    assert media.grids[:, 0].tolist() == [1, 2]
    assert len(processor.pixel_values(media)) == media.num_patches


@pytest.mark.parametrize(
    ("prompt", "data", "message"),
    [
        (ask(VIDEO, videos=[CLIP]), {"max_media_bytes": 99}, "video 0: .* more than data.max_media_b"),
        (ask(IMAGE, images=[png(frames(1)[0])]), {"max_media_bytes": 9}, "image 0: .* data.max_media_bytes=9"),
        (ask(VIDEO, videos=[CLIP]), {"max_image_pixels": 9}, "video 0: frames of 30 x 20 pixels are"),
        (ask(VIDEO, videos=[CLIP]), {"max_video_pixels": 9}, "video 0: 7 frames of 30 x 20 pixels"),
        (ask(VIDEO, VIDEO, videos=[CLIP, b"x"]), {}, "video 1: (not an animated GIF|cannot read)"),
        (ask(VIDEO), {}, "1 video placeholders for 0 videos"),
        (ask("What?", videos=[b"x"]), {}, "0 video placeholders for 1 videos"),
        (ask(IMAGE, videos=[b"x"]), {}, "1 image placeholders for 0 images"),
        (ask("<|video_pad|>"), {}, "1 video placeholders for 0 videos"),
    ],
)  # fmt: skip
def test_bad_videos_name_the_prompt_the_medium_and_the_limit(tiny_qwen, prompt, data, message):
    with pytest.raises(ValueError, match=rf"clips/train/3: {message}"):
        load(tiny_qwen, **data).encode(prompt)


def test_a_damaged_video_is_named_when_it_is_decoded(tiny_qwen):
    data = bytearray(encode("PNG", frames(8, 60, 60)))
    at = data.index(b"fdAT") + 12
    data[at : at + 6] = bytes(6)
    processor = load(tiny_qwen)
    media = processor.encode(ask(VIDEO, videos=[bytes(data)])).media
    with pytest.raises(ValueError, match="video 0 of 1: cannot decode frame 1 of the PNG video"):
        processor.pixel_values(media)
