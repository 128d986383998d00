"""The forward pass of an encoder on one device, in two halves, so that reading, copying and computing overlap.

Input: tiles, uint8 (n, 3, 256, 256). Output: vectors, float32 (n, dim). The thread that reads a tile cuts out the crop. The
crop travels to the device as bytes, from page-locked memory, while the device computes. The device converts it to floats
and normalises it. Vectors travel back while the next batch is computed.

This module depends on torch and numpy only. It imports torch inside functions, because that takes seconds.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    import torch

Finish = Callable[[], np.ndarray]
"""Waits for the vectors of a launched batch and returns them: float32 (n, dim)."""

# Measured on a CPU: twice as many tiles take a tenth longer per tile, because the system then provides the memory for their
# activations page by page every time.
BATCH_SIZE = {"cpu": 16, "cuda": 512}


class Forward(Protocol):
    """The two halves of a forward pass. Any thread may call `stage`; only one thread may call `launch`."""

    def stage(self, tiles: np.ndarray) -> Any:
        """Prepare tiles, uint8 (n, 3, 256, 256), for the device. Returns a sequence of length n."""

    def launch(self, staged: Any, pad_to: int = 0) -> Finish:
        """Start the computation.

        pad_to: a compiled network is compiled for one batch size, and a smaller batch is padded to this size. With 0 the
        network runs uncompiled and without padding.
        """


@dataclass(frozen=True)
class FunctionForward:
    """The forward pass of an encoder without a network: a function of tiles, uint8 (n, 3, 256, 256), to float32 (n, dim)."""

    function: Callable[[np.ndarray], np.ndarray]

    def stage(self, tiles: np.ndarray) -> np.ndarray:
        return tiles

    def launch(self, staged: np.ndarray, pad_to: int = 0) -> Finish:
        vectors = self.function(staged)
        return lambda: vectors


class NetworkForward:
    """The forward pass of a network. The constructor moves the weights to the device.

    preprocessing: `crop_px`, and per channel the `mean` and `std` of grey values from 0 to 1. compiled: whether to use
    `torch.compile`, which compiles for one batch size at a time.
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
        self._copy_stream = torch.cuda.Stream(device) if self._on_gpu else None
        mean, std = (torch.tensor(preprocessing[key], device=device).view(1, 3, 1, 1) * 255 for key in ("mean", "std"))

        def normalise(pixels: "torch.Tensor") -> "torch.Tensor":
            return pixels.to(torch.float32, memory_format=torch.channels_last).sub_(mean).div_(std)

        def normalise_rows(pixels: "torch.Tensor") -> "torch.Tensor":
            """Bit for bit the same as `normalise`, in a third of the time on a CPU: it walks the pixels in memory order."""
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
        if self._on_gpu:  # the GPU reorders the channels, which it does faster than a CPU
            staged = torch.empty(crops.shape, dtype=torch.uint8, pin_memory=True)
            np.copyto(staged.numpy(), crops)
            return staged
        return torch.from_numpy(np.ascontiguousarray(crops.transpose(0, 2, 3, 1))).permute(0, 3, 1, 2)

    def launch(self, staged: "torch.Tensor", pad_to: int = 0) -> Finish:
        import torch

        count = len(staged)
        with torch.inference_mode():
            pixels = self._to_device(staged)
            compute = self._compute
            if self._compiled is not None and pad_to:
                compute = self._compiled
                pixels = torch.cat([pixels, pixels.new_zeros((pad_to - count, *pixels.shape[1:]))])
            vectors = compute(pixels)[:count]
            if not self._on_gpu:
                return lambda: vectors.numpy()
            on_host = torch.empty(vectors.shape, dtype=torch.float32, pin_memory=True)
            on_host.copy_(vectors, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(torch.cuda.current_stream(self._device))

        def finish() -> np.ndarray:
            copied.synchronize()
            return on_host.numpy()

        return finish

    def bare(self, tiles: np.ndarray) -> Callable[[], None]:
        """A function that passes one batch through the network and waits for the result, as a reference for benchmarks.

        The batch already lies on the device and is normalised, so nothing but the network is timed.
        """
        import torch

        with torch.inference_mode():
            normalised = self._normalise(self._to_device(self.stage(tiles)))
        network = torch.compile(self._network, dynamic=False) if self._compiled is not None else self._network

        def run_once() -> None:
            with torch.inference_mode():
                network(normalised)
            if self._on_gpu:
                torch.cuda.synchronize(self._device)

        return run_once

    def _to_device(self, staged: "torch.Tensor") -> "torch.Tensor":
        """Copy to the device on a separate stream, so that the copy overlaps with the computation of the previous batch."""
        import torch

        if self._copy_stream is None:
            return staged
        computing = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._copy_stream):
            pixels = staged.to(self._device, non_blocking=True)
        computing.wait_stream(self._copy_stream)
        pixels.record_stream(computing)  # otherwise its memory could be reused during the computation
        return pixels
