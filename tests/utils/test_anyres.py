"""The geometry of tiled images against transformers' own."""

import math

import pytest
import torch

from megarl.utils import torchvision_cpu
from megarl.utils.anyres import best_resolution, max_tiles, shrunk, unpadded

torchvision_cpu.install()

from transformers.image_processing_utils import select_best_resolution  # noqa: E402
from transformers.models.llava_next.modeling_llava_next import unpad_image  # noqa: E402

NEXT = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
ONEVISION = [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)]
SIZES = [(480, 640), (1, 1), (1, 900), (333, 97), (28, 112), (1080, 1920), (37, 3000), (671, 673), (336, 336), (5, 7)]


@pytest.mark.parametrize("resolutions", [NEXT, ONEVISION])
def test_equals_transformers(resolutions):
    generator = torch.Generator().manual_seed(0)
    sizes = SIZES + [tuple(size) for size in torch.randint(1, 2500, (300, 2), generator=generator).tolist()]
    for size in sizes:
        best = best_resolution(size, resolutions)
        assert best == tuple(select_best_resolution(size, resolutions)), size
        grid = (best[0] // 14, best[1] // 14)
        places = torch.arange(grid[0] * grid[1]).view(1, *grid)
        rows, columns = unpadded(size, grid)
        assert torch.equal(places[:, rows, columns], unpad_image(places, size)), size


def test_more_than_the_bound_is_shrunk_to_it():
    assert shrunk((27, 54), 27, 9) == (27, 54)
    rows, columns = shrunk((108, 162), 27, 9)
    ratio = math.sqrt(108 * 162 / (9 * 27**2))
    assert (rows, columns) == (int(108 // ratio), int(162 // ratio))
    assert shrunk((85, 85), 27, 9) == (85, 85)  # not by a factor of 1.1 too many


def test_the_bound_is_a_number():
    assert max_tiles("anyres_max_9") == 9
    for wrong in ("anyres", "anyres_max_", "anyres_max_0", "square", "anyres_max_x"):
        with pytest.raises(ValueError, match=f"vision_aspect_ratio='{wrong}'"):
            max_tiles(wrong)
