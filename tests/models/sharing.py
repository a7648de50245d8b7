"""Microbatches of the parity tests whose images are shared by the ranks, as a run's are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from megatron.core import parallel_state

from megarl.data.sharing import Encoding, share_images
from megarl.models.common.vision import VisionInputs
from megarl.models.common.vlm import VisionLanguageModel
from megarl.types import Media, VisionShare
from tests.models.reference import Batch


def in_turn(microbatches: list[Batch], model: VisionLanguageModel) -> list[Batch]:
    """This data-parallel rank's, with its share of the images that all ranks show at the same time.

    Every rank of a stage calls it; an image is known by its pixels.
    """
    size, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    mine = microbatches[rank::size]
    if not model.pre_process:
        return [replace(batch, vision=None) for batch in mine]
    pixels: dict[bytes, torch.Tensor] = {}

    def shown(vision: VisionInputs | None) -> Media:
        if vision is None:
            return Media()
        images = vision.pixel_values.split(vision.grids.prod(1).tolist())
        names = [image.numpy().tobytes() for image in images]
        pixels.update(zip(names, images, strict=True))
        videos = np.zeros(len(names), bool) if vision.videos is None else vision.videos.numpy()
        media = Media(names, vision.grids.numpy(), vision.sizes.numpy(), videos.astype(np.float32))
        return media.select(vision.index.tolist())

    def inputs(share: VisionShare) -> VisionInputs:
        media = share.media
        values = torch.cat([pixels[name] for name in media.images] or [next(iter(pixels.values()))[:0]])
        tensors = (torch.from_numpy(array) for array in (media.grids, media.sizes, share.index))
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        videos = torch.from_numpy(media.is_video)
        return VisionInputs(values, *tensors, exchange=share.exchange, group=group, videos=videos)

    @torch.no_grad()
    def num_tokens(media: Media) -> np.ndarray:
        return np.array([len(tokens) for tokens in model.encode(inputs(VisionShare(media, np.arange(0), None, 0.0)))])

    encoding = Encoding(
        num_tokens=num_tokens,
        cost=lambda media: media.grids.prod(axis=1),
        max_patches=10**6,
        context_parallel_size=parallel_state.get_context_parallel_world_size(),
    )
    for number, batch in enumerate(mine):
        together = microbatches[number * size : (number + 1) * size]
        shares = share_images([shown(other.vision) for other in together], encoding)[rank]
        share = shares[parallel_state.get_context_parallel_rank()]
        mine[number] = replace(batch, vision=None if share is None else inputs(share))
    return mine
