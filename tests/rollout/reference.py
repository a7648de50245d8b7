"""What the engine is compared with: tiny random models and Hugging Face's own forward of them."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from examples import tiny_models
from megarl.checkpoint.huggingface import HFReader
from megarl.data.processors import Processor
from megarl.data.videos import pack_frames
from megarl.types import EncodedPrompt, Media, Prompt

TOLERANCE = 1e-4


def write_model(path: Path, seed: int, kind: str = "qwen2_5_vl") -> Path:
    """A random model of ``examples.tiny_models`` whose matrices are so large that every part moves the log-probs.

    Not larger: transformers' own log-probs in float32 are up to 3e-5 from those in float64, at three times up to 1e-4.
    """
    getattr(tiny_models, kind)(path, seed)
    named = {k: v * 2 if v.dim() > 1 else v for k, v in tensors(path).items()}
    save_file(named, path / "model.safetensors", metadata={"format": "pt"})
    return path


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """The weights of a directory as published."""
    reader = HFReader(path)
    return {name: reader[name].contiguous() for name in reader.keys()}  # noqa: SIM118


def image(seed: int, height: int = 56, width: int = 84) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def prompt(processor: Processor, num_images: int, index: int = 0, num_videos: int = 0) -> EncodedPrompt:
    """A question about ``num_images`` images of different sizes, and videos of different lengths."""
    shown = [{"type": "image"}] * num_images + [{"type": "video"}] * num_videos
    message = {"role": "user", "content": [*shown, {"type": "text", "text": f"What digits are these? {index}"}]}
    images = [image(10 * index + i, height=56 + 28 * i) for i in range(num_images)]
    frames = [[image(100 * i + number) for number in range(4 + 3 * i)] for i in range(num_videos)]
    prompt = Prompt(f"test/{num_images}/{index}", "test", [message], images)
    prompt.videos = [pack_frames(pictures, fps=2.0) for pictures in frames]
    return processor.encode(prompt)


class HuggingFace:
    """Log-probs by transformers with the weights of ``path``, some of them replaced."""

    def __init__(self, path: Path, processor: Processor, replaced: dict[str, torch.Tensor] | None = None) -> None:
        import transformers

        self.processor = processor
        kind = getattr(transformers, processor.config.architectures[0])
        self.model = kind.from_pretrained(path, dtype=torch.float32).eval()
        parameters = dict(self.model.named_parameters())
        for name, tensor in (replaced or {}).items():
            parameters[name if name.startswith("model.visual.") else f"model.{name}"].data.copy_(tensor)

    def images(self, media: Media) -> dict[str, torch.Tensor]:
        """What the model takes for the images and videos of a sequence."""
        shown = {}
        for names, chosen in (
            (("pixel_values", "image_grid_thw"), ~media.is_video),
            (("pixel_values_videos", "video_grid_thw"), media.is_video),
        ):
            part = media.select(np.flatnonzero(chosen).tolist())
            if part.images:
                shown |= dict(zip(names, (self.processor.pixel_values(part), torch.as_tensor(part.grids)), strict=True))
        return shown

    @torch.no_grad()
    def logprobs(
        self, tokens: np.ndarray, media: Media, *, temperature: float = 1.0, banned: bool = True
    ) -> np.ndarray:
        """[L - 1]: of tokens[1:], log_softmax(logits / temperature) with or without the banned ids."""
        shown = self.images(media) if media.images else {}
        positions = torch.as_tensor(self.processor.position_ids(tokens, media))[:, None]
        positions = positions[0] if len(positions) == 1 else positions
        ids = torch.as_tensor(tokens, dtype=torch.int64)[None]
        logits = self.model(input_ids=ids, position_ids=positions, **shown).logits[0, :-1] / temperature
        if banned:
            logits[:, self.processor.banned_token_ids] = -torch.inf
        return logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].numpy()
