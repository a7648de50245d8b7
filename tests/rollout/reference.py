"""What the engine is compared with: tiny random models and Hugging Face's own forward of them."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from examples.tiny_models import qwen2_5_vl
from megarl.data.processors import Processor
from megarl.types import EncodedPrompt, Media, Prompt

TOLERANCE = 1e-4


def write_model(path: Path, seed: int) -> Path:
    """A random Qwen2.5-VL whose matrices are large enough that every part of it moves the log-probs."""
    qwen2_5_vl(path, seed)
    file = path / "model.safetensors"
    save_file({k: v * 3 if v.dim() > 1 else v for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    return path


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """The weights of a directory under the names of its file."""
    return load_file(path / "model.safetensors")


def image(seed: int, height: int = 56, width: int = 84) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def prompt(processor: Processor, num_images: int, index: int = 0) -> EncodedPrompt:
    """A question about ``num_images`` images of different sizes."""
    parts = [{"type": "image"}] * num_images + [{"type": "text", "text": f"What digits are these? {index}"}]
    images = [image(10 * index + i, height=56 + 28 * i) for i in range(num_images)]
    message = {"role": "user", "content": parts}
    return processor.encode(Prompt(id=f"test/{num_images}/{index}", task="test", messages=[message], images=images))


class HuggingFace:
    """Log-probs by transformers with the weights of ``path``, some of them replaced."""

    def __init__(self, path: Path, processor: Processor, replaced: dict[str, torch.Tensor] | None = None) -> None:
        from transformers import AutoModelForImageTextToText

        self.processor = processor
        self.model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
        parameters = dict(self.model.named_parameters())
        for name, tensor in (replaced or {}).items():
            parameters[f"model.{name}"].data.copy_(tensor)

    def images(self, media: Media) -> dict[str, torch.Tensor]:
        """What the model takes for the images of a sequence."""
        return {"pixel_values": self.processor.pixel_values(media), "image_grid_thw": torch.as_tensor(media.grids)}

    @torch.no_grad()
    def logprobs(
        self, tokens: np.ndarray, media: Media, *, temperature: float = 1.0, banned: bool = True
    ) -> np.ndarray:
        """[L - 1]: of tokens[1:], log_softmax(logits / temperature) with or without the banned ids."""
        images = self.images(media) if media.images else {}
        positions = torch.as_tensor(self.processor.position_ids(tokens, media))[:, None]
        positions = positions[0] if len(positions) == 1 else positions
        ids = torch.as_tensor(tokens, dtype=torch.int64)[None]
        logits = self.model(input_ids=ids, position_ids=positions, **images).logits[0, :-1] / temperature
        if banned:
            logits[:, self.processor.banned_token_ids] = -torch.inf
        return logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].numpy()
