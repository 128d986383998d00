"""The space that a volume fills, and which positions lie in it."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class VolumeBounds:
    """low_nm_zyx, high_nm_zyx: the corners; the low one is inside, the high one outside. voxel_size_nm_zyx: (3,), in nm."""

    low_nm_zyx: np.ndarray
    high_nm_zyx: np.ndarray
    voxel_size_nm_zyx: np.ndarray

    def contain(self, positions_nm_zyx: np.ndarray) -> np.ndarray:
        """Whether each of the positions (n, 3) lies in the volume; bool (n,). NaN and infinity lie outside."""
        return np.all((positions_nm_zyx >= self.low_nm_zyx) & (positions_nm_zyx < self.high_nm_zyx), axis=1)

    def spanned_share(self, positions_nm_zyx: np.ndarray) -> np.ndarray:
        """The share of each axis, (3,), between the 1st and the 99th percentile of the positions (n, 3)."""
        clipped = np.clip(positions_nm_zyx, self.low_nm_zyx, self.high_nm_zyx)
        first, last = np.percentile(clipped, [1, 99], axis=0)
        return (last - first) / (self.high_nm_zyx - self.low_nm_zyx)

    def __str__(self) -> str:
        axes = ((2, "x"), (1, "y"), (0, "z"))
        return ", ".join(f"{axis} {self.low_nm_zyx[i]:g} to {self.high_nm_zyx[i]:g}" for i, axis in axes)
