"""What it costs to encode an image: more patches cost more than in proportion where they attend to each other."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class TowerCost:
    """The numbers of a vision transformer that its cost depends on; the projector's few per cent are left out."""

    hidden_size: int
    num_layers: int
    mlp_weights: int  # of one layer
    windowed_layers: int = 0  # of ``num_layers``, those that attend within windows
    window: int = 0  # a window's side in patches

    def __call__(self, grids: np.ndarray) -> np.ndarray:
        """Multiplications of a forward pass for [I, 3] grids of (time or tiles, height, width) in patches: [I] float64.

        A layer multiplies each patch with its matrices, and each pair of patches that attend to each other, of one
        frame or of one window, twice a channel.
        """
        frames, heights, widths = np.asarray(grids, np.float64).T
        patches = frames * heights * widths
        matrices = self.num_layers * (4 * self.hidden_size**2 + self.mlp_weights)
        pairs = (self.num_layers - self.windowed_layers) * frames * (heights * widths) ** 2
        if self.windowed_layers:
            pairs += self.windowed_layers * frames * self._squares(heights) * self._squares(widths)
        return matrices * patches + 2 * self.hidden_size * pairs

    def _squares(self, sides: np.ndarray) -> np.ndarray:
        """Sums of the squared lengths of what windows make of each side; the last of them may be shorter."""
        return sides // self.window * self.window**2 + (sides % self.window) ** 2
