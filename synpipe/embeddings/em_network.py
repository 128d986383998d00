"""The network `d4resnet`: a small residual network for EM tiles whose vectors do not change when a tile is turned or mirrored.

Input: tiles as float (n, 3, h, w), of any brightness and contrast. Output: vectors, float (n, 256). Importing this module
registers the network with timm, so that `encoders.yaml` can name it like any other. The eight turns and mirrorings of a
tile give the same vector up to rounding if `size / shrink` is odd, as with the default crop of 194 px.

Sections have no preferred orientation, so an ordinary network must learn each orientation separately. A group convolution
(Cohen & Welling, ICML 2016, arXiv:1602.07576) has this symmetry built in: it applies each filter in the eight poses of D4,
the symmetry group of the square. Angles between quarter turns remain to be learned.

The network first averages `shrink` × `shrink` pixels. This turns pixels of 4–5 nm into pixels of 8–9 nm, which still resolve
membranes and vesicles, at a quarter of the work. It then standardises each section by its own mean and standard deviation,
because brightness and contrast in EM are properties of the section, not of the tissue.

After a change that alters vectors, raise `NETWORK_METHOD` in `encoder_specs`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.models import build_model_with_cfg, register_model
from torch import Tensor, nn

POSES = 8
DIM = 256
STRIDE = 16  # distance between points of the final map, in pixels after shrinking
CENTRE_SIGMAS_PX = (9.0, 23.0)
"""Standard deviations of the Gaussian weights around the centre, in pixels after shrinking. With tiles of 4.6 nm pixels they
are about 80 nm (the very centre) and 210 nm (a synapse with its surroundings)."""
MIN_STD = 1 / 255
"""Lower limit for the standard deviation of a section, one grey value, so that the noise of a uniform section stays small."""

default_cfgs = {
    "d4resnet": {
        "url": "",
        "num_classes": 0,
        "input_size": (3, 194, 194),
        "pool_size": None,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": (0.0, 0.0, 0.0),
        "std": (1.0, 1.0, 1.0),
        "first_conv": "stem",
        "classifier": "fc",
    }
}


def pose(image: Tensor, number: int) -> Tensor:
    """The image (..., h, w) mirrored if `number` ≥ 4, then turned by `number` mod 4 quarter turns."""
    mirrored = image.flip(-1) if number >= POSES // 2 else image
    return torch.rot90(mirrored, number % 4, (-2, -1))


def _relative_poses() -> Tensor:
    """The number of the pose g⁻¹h for each pair of poses g and h: int64 (8, 8)."""
    image = torch.arange(16.0).view(4, 4)  # looks different in each pose
    posed = [pose(image, g) for g in range(POSES)]

    def number_of(transformed: Tensor) -> int:
        return next(g for g in range(POSES) if torch.equal(transformed, posed[g]))

    products = [[number_of(pose(posed[h], g)) for h in range(POSES)] for g in range(POSES)]
    return torch.tensor([[products[products[g].index(0)][h] for h in range(POSES)] for g in range(POSES)])


RELATIVE_POSES = _relative_poses()


class GroupConv(nn.Module):
    """A convolution that applies each filter in eight poses: (n, fields_in·8, h, w) to (n, fields_out·8, h', w').

    Poses are the fastest axis of the channels. lift: the input is an image without poses, (n, fields_in, h, w).
    """

    def __init__(self, fields_in: int, fields_out: int, size: int, stride: int = 1, lift: bool = False):
        super().__init__()
        poses_in = 1 if lift else POSES
        self.lift, self.stride, self.padding = lift, stride, size // 2
        self.weight = nn.Parameter(torch.empty(fields_out, fields_in * poses_in, size, size))
        nn.init.normal_(self.weight, std=(2 / (fields_in * poses_in * size * size)) ** 0.5)  # He et al., 2015

    def forward(self, x: Tensor) -> Tensor:
        if self.lift:
            filters = [pose(self.weight, g) for g in range(POSES)]
        else:
            by_pose = self.weight.unflatten(1, (-1, POSES))
            filters = [pose(by_pose[:, :, RELATIVE_POSES[g]], g).flatten(1, 2) for g in range(POSES)]
        kernel = torch.stack(filters, 1).flatten(0, 1).contiguous(memory_format=torch.channels_last)
        return F.conv2d(x, kernel, stride=self.stride, padding=self.padding)


class FieldNorm(nn.Module):
    """Batch normalisation whose scale, shift and running statistics are shared by the eight poses of a field."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, fields: int, scale: float = 1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.full((fields,), scale))
        self.bias = nn.Parameter(torch.zeros(fields))
        self.register_buffer("running_mean", torch.zeros(fields))
        self.register_buffer("running_var", torch.ones(fields))

    def forward(self, x: Tensor) -> Tensor:
        mean, var, weight, bias = (
            values.repeat_interleave(POSES) for values in (self.running_mean, self.running_var, self.weight, self.bias)
        )
        out = F.batch_norm(x, mean, var, weight, bias, training=self.training)  # updates `mean` and `var` in place
        if self.training:
            with torch.no_grad():
                self.running_mean.copy_(mean.view(-1, POSES).mean(1))
                self.running_var.copy_(var.view(-1, POSES).mean(1))
        return out


class ResidualBlock(nn.Module):
    """Two 3 × 3 convolutions and a shortcut (He et al., CVPR 2016)."""

    def __init__(self, fields_in: int, fields_out: int, stride: int):
        super().__init__()
        self.conv1, self.norm1 = GroupConv(fields_in, fields_out, 3, stride), FieldNorm(fields_out)
        self.conv2, self.norm2 = GroupConv(fields_out, fields_out, 3), FieldNorm(fields_out, scale=0.3)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or fields_in != fields_out:
            self.shortcut = nn.Sequential(GroupConv(fields_in, fields_out, 1, stride), FieldNorm(fields_out))

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(inner)) + self.shortcut(x))


class D4ResNet(nn.Module):
    """See the docstring of this module. width: factor for the fields. depth: residual blocks per stage. With 1 and 1, the
    network has 0.19 million parameters."""

    def __init__(
        self, num_classes: int = 0, in_chans: int = 3, width: int = 1, depth: int = 1, shrink: int = 2, **_: Any
    ):
        super().__init__()
        self.shrink = shrink
        fields = 8 * width
        self.stem, self.stem_norm = GroupConv(in_chans, fields, 5, stride=2, lift=True), FieldNorm(fields)
        blocks = []
        for stage, wider in enumerate((8 * width, 16 * width, 32 * width)):
            for number in range(depth):
                blocks.append(ResidualBlock(fields, wider, stride=2 if stage and not number else 1))
                fields = wider
        self.blocks = nn.Sequential(*blocks)
        self.last, self.last_norm = GroupConv(fields, 128, 1), FieldNorm(128)
        self.pooled = (len(CENTRE_SIGMAS_PX) + 1) * 2 * 128
        # Pretraining sets this layer once, at its end (`pretraining._whiten`). Until then it is the identity.
        self.whitening = nn.Linear(self.pooled, DIM).requires_grad_(False)
        nn.init.eye_(self.whitening.weight)
        nn.init.zeros_(self.whitening.bias)
        self.num_features = self.head_hidden_size = DIM
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward_features(self, x: Tensor) -> Tensor:
        """Maps that do not depend on the pose, the mean and the maximum over poses: (n, 256, h / 32, w / 32)."""
        x = F.avg_pool2d(x, self.shrink) if self.shrink > 1 else x
        x = standardise(x)
        x = F.max_pool2d(F.relu(self.stem_norm(self.stem(x))), 3, stride=2, padding=1)
        x = F.relu(self.last_norm(self.last(self.blocks(x)))).unflatten(1, (-1, POSES))
        return torch.cat([x.mean(2), x.amax(2)], 1)

    def pool(self, x: Tensor) -> Tensor:
        """Pool maps into vectors (n, 768): a mean weighted towards the centre for each width, and the plain mean."""
        x = x.float()
        means = []
        for sigma in CENTRE_SIGMAS_PX:
            rows, columns = (_gaussian_weights(size, sigma / STRIDE, x.device) for size in x.shape[-2:])
            means.append((x * rows[:, None] * columns).sum((2, 3)))
        return torch.cat([*means, x.mean((2, 3))], 1)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        vectors = self.whitening(self.pool(x))
        return vectors if pre_logits else self.fc(vectors)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def standardise(x: Tensor) -> Tensor:
    """Scale each section of x, (n, sections, h, w), to mean 0 and standard deviation 1."""
    std, mean = torch.std_mean(x, (2, 3), keepdim=True)
    return (x - mean) / std.clamp_min(MIN_STD)


def _gaussian_weights(size: int, sigma: float, device: torch.device) -> Tensor:
    """A Gaussian around the middle of an axis, with sum 1: (size,)."""
    offset = torch.arange(size, device=device) - (size - 1) / 2
    weights = torch.exp(-(offset**2) / (2 * sigma**2))
    return weights / weights.sum()


@register_model
def d4resnet(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The entry point that timm calls."""
    return build_model_with_cfg(D4ResNet, "d4resnet", pretrained, **kwargs)
