"""What the template of ``winograd_conv2d`` and the pass that chooses it have to agree on."""

from __future__ import annotations

import math
from collections.abc import Sequence

# From so many tiles on, transforming the weight takes about 3 % of a call or less: with AVX2 it takes as long as about
# 20 tiles, with AVX-512 as long as 11 to 19.
_MANY_TILES = 600


def count_tiles(batch: int, size: Sequence[int], tile: int) -> int:
    """Tiles of a result of this size, height and width."""
    return batch * math.prod(-(-n // tile) for n in size)


def worth_their_memory(tiles: int) -> bool:
    """Whether a weight that is transformed before, which takes more memory, saves so many tiles much of their time."""
    return tiles < _MANY_TILES
