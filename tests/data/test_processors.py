import json
import shutil
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from examples import tiny_models
from megarl.config import DataConfig, ModelConfig, RunConfig
from megarl.data.images import decode_image, image_size
from megarl.data.processors import Processor, load_processor
from megarl.tasks.digits import Digits
from megarl.types import Media, Prompt

LIMIT = 64_000_000


def encode(image: Image.Image, form: str = "PNG", **options) -> bytes:
    out = BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def load(path: Path, max_image_pixels: int = LIMIT, **bounds: int) -> Processor:
    return load_processor(
        path, RunConfig(model=ModelConfig(**bounds), data=DataConfig(max_image_pixels=max_image_pixels))
    )


def media(image: bytes, grid: list[int]) -> Media:
    return Media([image], np.array([grid]), np.zeros((1, 2), np.int64), np.zeros(1))


def ask(*images: bytes, text: str = "What digits are in this image?") -> Prompt:
    content = [{"type": "image"} for _ in images] + [{"type": "text", "text": text}]
    return Prompt(id="digits/train/7", task="digits", messages=[{"role": "user", "content": content}], images=[*images])


@pytest.mark.parametrize(
    ("height", "width"),
    [(28, 112), (1, 1), (13, 91), (57, 55), (200, 301), (333, 97), (640, 427), (40, 4000), (3, 500)],
)
def test_grid_from_the_header_and_pixels_equal_hugging_face(processor, tiny_qwen, height, width):
    image = noise(height, width)
    encoded = processor.encode(ask(encode(image)))
    expected = Qwen2VLImageProcessorPil.from_pretrained(tiny_qwen)(images=[image], return_tensors="pt")
    assert encoded.media.grids.tolist() == expected["image_grid_thw"].tolist()
    pixels = processor.pixel_values(encoded.media)
    assert pixels.dtype == torch.float32
    assert torch.equal(pixels, expected["pixel_values"].float())
    assert (encoded.tokens == processor.image_token_id).sum() == expected["image_grid_thw"].prod() // 4


def test_pixels_of_a_digit_strip_are_its_normalised_patches(processor):
    strip = np.zeros((28, 112), np.uint8)
    strip[:14, 14:28] = 255  # the second patch of the first merged patch
    media = processor.encode(ask(encode(Image.fromarray(strip)))).media
    pixels = processor.pixel_values(media)
    assert media.grids.tolist() == [[1, 2, 8]]
    assert pixels.shape == (16, 3 * 2 * 14 * 14)
    white, black = (1 - 0.1307) / 0.3081, -0.1307 / 0.3081
    assert torch.allclose(pixels.mean(1), torch.tensor([black, white] + [black] * 14), atol=1e-5)


def test_bounds_of_the_configuration_replace_those_of_the_preprocessor(tiny_qwen):
    small = load(tiny_qwen, max_pixels=4 * 28 * 28)
    encoded = small.encode(ask(encode(noise(200, 200))))
    assert encoded.media.grids.tolist() == [[1, 4, 4]]
    assert len(small.pixel_values(encoded.media)) == 16
    large = load(tiny_qwen, min_pixels=16 * 28 * 28)
    assert large.encode(ask(encode(noise(28, 28)))).media.grids.tolist() == [[1, 8, 8]]
    with pytest.raises(ValueError, match=r"model.min_pixels=60000 is more than model.max_pixels=50176"):
        load(tiny_qwen, min_pixels=60_000)


def test_tokens_equal_hugging_faces_processor(processor, tiny_qwen):
    reference = transformers.AutoProcessor.from_pretrained(tiny_qwen)
    pictures = [noise(28, 112, 1), noise(90, 50, 2), noise(60, 150, 3)]
    prompt = ask(*(encode(picture) for picture in pictures))
    text = reference.apply_chat_template(prompt.messages, tokenize=False, add_generation_prompt=True)
    expected = reference(text=[text], images=pictures, return_tensors="np")
    encoded = processor.encode(prompt)
    assert encoded.tokens.dtype == np.int32
    assert encoded.tokens.tolist() == expected["input_ids"][0].tolist()
    assert encoded.media.grids.tolist() == expected["image_grid_thw"].tolist()


@pytest.mark.parametrize("model_class", ["Qwen2VLModel", "Qwen2_5_VLModel"])
@pytest.mark.parametrize("sizes", [[], [(28, 112)], [(28, 112), (200, 90), (28, 28), (91, 300)]])
def test_position_ids_equal_hugging_face(processor, model_class, sizes):
    encoded = processor.encode(ask(*(encode(noise(*size)) for size in sizes)))
    tokens = np.concatenate([encoded.tokens, processor.encode_response("1,2,3")])
    ours = processor.position_ids(tokens, encoded.media)
    assert ours.shape == (3, len(tokens))
    if not sizes:
        assert (ours == np.arange(len(tokens))).all()
        return
    config_class = {"Qwen2VLModel": transformers.Qwen2VLConfig, "Qwen2_5_VLModel": transformers.Qwen2_5_VLConfig}
    config = config_class[model_class](
        **{k: v for k, v in processor.config.to_dict().items() if k.endswith("_token_id")}
    )
    with torch.device("meta"):
        model = getattr(transformers, model_class)(config)
    ids = torch.tensor(tokens).long()[None]
    expected, _ = model.get_rope_index(
        ids, (ids == processor.image_token_id).int(), image_grid_thw=torch.tensor(encoded.media.grids)
    )
    assert ours.tolist() == expected[:, 0].tolist()


def test_position_ids_by_hand(processor):
    image, one_image = processor.image_token_id, media(b"", [1, 2, 4])
    positions = processor.position_ids(np.array([0, image, image, 0, 0]), one_image)
    assert positions.tolist() == [[0, 1, 1, 3, 4], [0, 1, 1, 3, 4], [0, 1, 2, 3, 4]]
    with pytest.raises(ValueError, match="1 image and video tokens for grids of 2"):
        processor.position_ids(np.array([image]), one_image)


def test_a_policy_never_samples_media_tokens_and_ends_with_eos(processor):
    words = processor.tokenizer.convert_ids_to_tokens(processor.banned_token_ids)
    assert words == ["<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
    assert processor.tokenizer.convert_ids_to_tokens(processor.eos_token_ids) == ["<|im_end|>", "<|endoftext|>"]
    assert processor.encode_response("3,5").tolist()[-1] == processor.eos_token_ids[0]
    assert processor.decode(processor.encode_response("3, 5 ÿ é")) == "3, 5 ÿ é"


def test_padding_that_does_not_end_is_banned(tiny_qwen, tmp_path):
    shutil.copytree(tiny_qwen, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": 409}))
    processor = load_processor(tmp_path / "model")
    assert processor.eos_token_ids == [processor.tokenizer.eos_token_id] == [409]
    assert processor.tokenizer.pad_token_id in processor.banned_token_ids


def test_the_tiny_tokenizer_keeps_words_and_digits_whole(processor):
    encoded = processor.encode(Digits("digits", DataConfig()).prompt("train", 0))
    assert len(encoded.tokens) == 34
    question = [processor.tokenizer.decode([token]) for token in encoded.tokens[9:29]]
    assert question[:6] == ["What", " digits", " are", " in", " this", " image"]
    assert (
        "".join(question) == "What digits are in this image? I need the digits in a list sorted from lowest to highest."
    )
    assert len(processor.encode_response("1,2,3")) == 6
    assert len({processor.encode_response(str(digit))[0] for digit in range(10)}) == 10
    assert len(processor.tokenizer) == processor.config.text_config.vocab_size <= 512


def test_the_tiny_model_is_the_same_for_the_same_seed(tiny_qwen, tmp_path):
    tiny_models.qwen2_5_vl(tmp_path / "again", seed=0)
    tiny_models.qwen2_5_vl(tmp_path / "other", seed=1)
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tiny_qwen / name).read_bytes()
    assert (tmp_path / "other" / "model.safetensors").read_bytes() != (tiny_qwen / "model.safetensors").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "other"]


def test_an_assistants_beginning_is_continued(processor):
    prompt = ask()
    prompt.messages.append({"role": "assistant", "content": "<think>"})
    assert processor.render(prompt).endswith("<|im_start|>assistant\n<think>")
    assert processor.render(ask()).endswith("<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("mode", "form", "pixel"),
    [
        ("L", "PNG", (100, 100, 100)),
        ("1", "PNG", (255, 255, 255)),
        ("P", "PNG", None),
        ("I;16", "PNG", (100, 100, 100)),
        ("RGBA", "PNG", (155, 155, 155)),
        ("LA", "PNG", (155, 155, 155)),
        ("CMYK", "JPEG", None),
        ("L", "GIF", (100, 100, 100)),
        ("RGB", "WEBP", None),
    ],
)
def test_every_mode_becomes_rgb(processor, mode, form, pixel):
    if mode == "I;16":
        image = Image.fromarray(np.full((30, 60), 100 << 8, np.uint16))
    elif mode in ("RGBA", "LA"):  # a transparent half lies on white: 255 - (255 - 100) * 164 / 255 = 155
        image = Image.new(mode, (60, 30), (100, 100, 100, 164) if mode == "RGBA" else (100, 164))
    else:
        image = Image.new("L", (60, 30), 255 if mode == "1" else 100).convert(mode)
    data = encode(image, form)
    decoded = decode_image(data, LIMIT)
    assert (decoded.mode, decoded.size) == ("RGB", (60, 30))
    if pixel is not None:
        assert decoded.getpixel((5, 5)) == pixel
    encoded = processor.encode(ask(data))
    assert len(processor.pixel_values(encoded.media)) == encoded.media.num_patches


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied_to_the_grid_and_the_pixels(processor, form, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(noise(28, 112), form, exif=exif)
    turned = orientation >= 5
    assert image_size(data, LIMIT) == ((112, 28) if turned else (28, 112))
    encoded = processor.encode(ask(data))
    assert encoded.media.grids.tolist() == ([[1, 8, 2]] if turned else [[1, 2, 8]])
    assert len(processor.pixel_values(encoded.media)) == 16
    reference = transformers.image_utils.load_image(Image.open(BytesIO(data)))
    assert np.array_equal(np.asarray(decode_image(data, LIMIT)), np.asarray(reference))


def test_bad_images_name_the_prompt_and_the_image(processor):
    good = encode(noise(28, 56))
    jpeg = encode(noise(300, 300), "JPEG")
    damaged = bytearray(encode(noise(64, 64)))
    damaged[2000:2010] = b"\0" * 10
    for bad, why in [
        (b"", "cannot read its header"),
        (b"not an image", "cannot read its header"),
        (good[:40], "cannot"),
        (good[: len(good) // 2], "cannot decode the PNG image"),
        (jpeg[: len(jpeg) // 2], "cannot decode the JPEG image"),
        (bytes(damaged), "cannot decode the PNG image"),
        (encode(Image.new("L", (4100, 20))), "aspect ratio"),
    ]:
        with pytest.raises(ValueError, match=rf"digits/train/7: image 1: .*{why}"):
            processor.encode(ask(good, bad))


def test_a_bomb_is_refused_by_its_header(tiny_qwen):
    small = load(tiny_qwen, max_image_pixels=1000)
    with pytest.raises(ValueError, match=r"image 0: 56 x 28 pixels are more than data.max_image_pixels=1000"):
        small.encode(ask(encode(noise(28, 56))))
    with pytest.raises(ValueError, match="image 0 of 1: 56 x 28 pixels"):
        small.pixel_values(media(encode(noise(28, 56)), [1, 2, 4]))
    side = 60_000  # 3.6 gigapixels in a header, no data
    header = b"IHDR" + side.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    bomb = b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4, "big") + header + zlib.crc32(header).to_bytes(4, "big")
    with pytest.raises(ValueError, match="digits/train/7: image 0: "):
        load_processor(tiny_qwen).encode(
            ask(bomb + (0).to_bytes(4, "big") + b"IDAT" + zlib.crc32(b"IDAT").to_bytes(4, "big"))
        )


def test_placeholders_and_images_must_match(processor):
    image = encode(noise(28, 28))
    prompt = ask(image)
    prompt.images.append(image)
    with pytest.raises(ValueError, match="digits/train/7: 1 image placeholders for 2 images"):
        processor.encode(prompt)
    with pytest.raises(ValueError, match="2 image placeholders for 1 images"):
        processor.encode(ask(image, text="smuggled <|image_pad|>"))
    with pytest.raises(ValueError, match="image 0 has 4 patches, its grid says"):
        processor.pixel_values(media(image, [1, 4, 8]))


def test_no_images_give_no_pixels(processor):
    encoded = processor.encode(ask())
    assert encoded.media.grids.shape == (0, 3)
    assert processor.pixel_values(encoded.media).shape == (0, processor.patch_dim) == (0, 1176)


def test_a_caller_cannot_change_cached_pixels(processor):
    shown = processor.encode(ask(encode(noise(28, 56, 9)))).media
    first = processor.pixel_values(shown)
    kept = first.clone()
    first.zero_()
    assert torch.equal(processor.pixel_values(shown), kept)


def test_other_models_are_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}))
    with pytest.raises(ValueError, match=r"architectures=\['GPT2LMHeadModel'\] is not one of Qwen2VLForCond"):
        load_processor(tmp_path)
