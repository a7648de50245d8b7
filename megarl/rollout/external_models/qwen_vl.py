"""Qwen2.5-VL in SGLang with the videos of the model as it was published: its tower attends frame by frame.

SGLang's own attends to a whole video in the layers that see more than a window (srt/models/qwen2_5_vl.py).
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from sglang.srt.managers.schedule_batch import MultimodalDataItem
from sglang.srt.models import qwen2_5_vl
from torch import Tensor


class Qwen2_5_VLForConditionalGeneration(qwen2_5_vl.Qwen2_5_VLForConditionalGeneration):
    """To the tower a video of n frames is n images of the same size."""

    def get_video_feature(self, items: list[MultimodalDataItem]) -> Tensor:
        """[n, H]: the tokens of all videos; called by SGLang."""
        return super().get_video_feature(
            [SimpleNamespace(feature=item.feature, video_grid_thw=_frames(item.video_grid_thw)) for item in items]
        )


def _frames(grids: Tensor) -> Tensor:
    """[n, 3] (1, height, width): the grids of all frames, from [I, 3] of videos."""
    frames = torch.repeat_interleave(grids, grids[:, 0], dim=0)
    frames[:, 0] = 1
    return frames


EntryClass = [Qwen2_5_VLForConditionalGeneration]
