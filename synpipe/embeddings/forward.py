"""A network on a device: bytes of tiles go in, vectors come out, and nobody waits who has something else to do.

In: tiles, uint8 (n, 3, 256, 256). Out: vectors, float32 (n, dim). What happens where: the crop is cut out where the tile is
read, in whichever thread that is; the bytes travel as they are, from page-locked memory and beside the computation; they
become floats, and are normalised, on the device; vectors travel back while the next batch is computed.

Only torch and numpy are imported here, and torch late: it takes seconds.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    import torch

Finish = Callable[[], np.ndarray]
"""Waits for the vectors of a batch that was launched: float32 (n, dim)."""

# Measured on a CPU: twice as many take a tenth longer a tile, for their activations come from the system page by page each time.
BATCH_SIZE = {"cpu": 16, "cuda": 512}


class Forward(Protocol):
    """The two halves of a forward pass: `stage` may be called in any thread, `launch` in one only."""

    def stage(self, tiles: np.ndarray) -> Any:
        """What is to travel to the device, of tiles uint8 (n, 3, 256, 256): a sequence of n."""

    def launch(self, staged: Any, pad_to: int = 0) -> Finish:
        """Begin the computation. pad_to: tiles that a compiled network is filled up to, since it is compiled for a number of
        them; 0: as it is, not compiled."""


@dataclass(frozen=True)
class Computed:
    """The forward pass of what is no network: a function of tiles, uint8 (n, 3, 256, 256), to float32 (n, dim)."""

    function: Callable[[np.ndarray], np.ndarray]

    def stage(self, tiles: np.ndarray) -> np.ndarray:
        return tiles

    def launch(self, staged: np.ndarray, pad_to: int = 0) -> Finish:
        vectors = self.function(staged)
        return lambda: vectors


class NetworkForward:
    """The forward pass of a network, whose weights it moves to the device.

    preprocessing: `crop_px`, and per channel `mean` and `std` of grey values from 0 to 1. compiled: by `torch.compile`, for
    one number of tiles at a time.
    """

    def __init__(
        self,
        model: "torch.nn.Module",
        preprocessing: Mapping[str, Any],
        device: "torch.device",
        precision: str,
        compiled: bool,
        tile_px: int,
    ) -> None:
        import torch

        model = model.eval().to(memory_format=torch.channels_last).to(device)  # type: ignore[call-overload]
        crop_px = preprocessing["crop_px"]
        self._crop = slice((tile_px - crop_px) // 2, (tile_px + crop_px) // 2)
        self._device = device
        self._on_gpu = device.type == "cuda"
        self._copies = torch.cuda.Stream(device) if self._on_gpu else None
        mean, std = (torch.tensor(preprocessing[key], device=device).view(1, 3, 1, 1) * 255 for key in ("mean", "std"))

        def normalise(pixels: "torch.Tensor") -> "torch.Tensor":
            return pixels.to(torch.float32, memory_format=torch.channels_last).sub_(mean).div_(std)

        def normalise_rows(pixels: "torch.Tensor") -> "torch.Tensor":
            """The same to the last bit, in a third of the time of a CPU: pixels beside each other are, as they lie in memory."""
            interleaved = pixels.permute(0, 2, 3, 1)
            rows = interleaved.reshape(-1, 3 * crop_px).to(torch.float32).sub_(mean_row).div_(std_row)
            return rows.view(interleaved.shape).permute(0, 3, 1, 2)

        mean_row, std_row = (values.flatten().repeat(crop_px) for values in (mean, std))

        def network(normalised: "torch.Tensor") -> "torch.Tensor":
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                return model(normalised).float()

        def compute(pixels: "torch.Tensor") -> "torch.Tensor":
            return network(self._normalise(pixels))

        self._network, self._compute = network, compute
        self._normalise = normalise if self._on_gpu else normalise_rows
        self._compiled = torch.compile(compute, dynamic=False) if compiled else None

    def stage(self, tiles: np.ndarray) -> "torch.Tensor":
        import torch

        crops = tiles[:, :, self._crop, self._crop]
        if self._on_gpu:  # which puts the channels beside each other faster than a CPU does
            staged = torch.empty(crops.shape, dtype=torch.uint8, pin_memory=True)
            np.copyto(staged.numpy(), crops)
            return staged
        return torch.from_numpy(np.ascontiguousarray(crops.transpose(0, 2, 3, 1))).permute(0, 3, 1, 2)

    def launch(self, staged: "torch.Tensor", pad_to: int = 0) -> Finish:
        import torch

        count = len(staged)
        with torch.inference_mode():
            pixels = self._travel(staged)
            compute = self._compute
            if self._compiled is not None and pad_to:
                compute = self._compiled
                pixels = torch.cat([pixels, pixels.new_zeros((pad_to - count, *pixels.shape[1:]))])
            vectors = compute(pixels)[:count]
            if not self._on_gpu:
                return lambda: vectors.numpy()
            back = torch.empty(vectors.shape, dtype=torch.float32, pin_memory=True)
            back.copy_(vectors, non_blocking=True)
            done = torch.cuda.Event()
            done.record(torch.cuda.current_stream(self._device))

        def finish() -> np.ndarray:
            done.synchronize()
            return back.numpy()

        return finish

    def bare(self, tiles: np.ndarray) -> Callable[[], None]:
        """A function that passes one batch through the network and waits for it, and does nothing else: the batch lies on the
        device and is normalised. What every loop around the network is held against."""
        import torch

        with torch.inference_mode():
            ready = self._normalise(self._travel(self.stage(tiles)))
        network = torch.compile(self._network, dynamic=False) if self._compiled is not None else self._network

        def once() -> None:
            with torch.inference_mode():
                network(ready)
            if self._on_gpu:
                torch.cuda.synchronize(self._device)

        return once

    def _travel(self, staged: "torch.Tensor") -> "torch.Tensor":
        """To the device, on a stream of its own there, so that a copy runs beside the batch before it."""
        import torch

        if self._copies is None:
            return staged
        computing = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._copies):
            pixels = staged.to(self._device, non_blocking=True)
        computing.wait_stream(self._copies)
        pixels.record_stream(computing)  # else its memory could be given away while it is computed with
        return pixels
