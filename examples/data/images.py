"""Small images held in memory as one uint8 tensor; a batch is cut, shifted and flipped by tensor operations, without a Python loop."""

import torch
from torch import Tensor
from torch.nn import functional as F


class TensorImages:
    """A data set of uint8 `images` [N, C, H, W] and int64 `targets` [N].

    `mean` and `std` (per channel, of pixels in 0..1) normalize. Augmentation shifts by up to `pad` pixels, black flowing in, and mirrors
    half of the images where `flip` is set.
    """

    def __init__(self, images: Tensor, targets: Tensor, classes: int, mean, std, pad: int = 0, flip: bool = False):
        self.images, self.targets, self.classes = images, targets, classes
        self.channels = images.shape[1]
        self.mean, self.std = (torch.tensor(v).view(1, -1, 1, 1) for v in (mean, std))
        self.pad, self.flip = pad, flip
        self._drawn = (None, None, None)

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Tensor, draw: int | None = None) -> tuple[Tensor, Tensor]:
        """Normalized images and targets of `indices`, augmented by random draw number `draw` unless it is None."""
        images = self.images[indices]
        if draw is not None:
            offsets, mirrored = self._draw(draw)
            images = shift(images, offsets[indices], self.pad)
            if self.flip:
                images = torch.where(mirrored[indices].view(-1, 1, 1, 1), images.flip(3), images)
        return (images.float().div_(255) - self.mean) / self.std, self.targets[indices]

    def _draw(self, draw):
        # Drawn for the whole set at once, so that an image's draw does not depend on the batch it is in.
        if self._drawn[0] != draw:
            generator = torch.Generator().manual_seed(draw)
            offsets = torch.randint(0, 2 * self.pad + 1, (len(self), 2), generator=generator)
            self._drawn = (draw, offsets, torch.rand(len(self), generator=generator) < 0.5)
        return self._drawn[1:]


def shift(images: Tensor, offsets: Tensor, pad: int) -> Tensor:
    """Crop `images` [B, C, H, W], padded with `pad` zeros on every side, to their own size at `offsets` [B, 2] (row, column)."""
    batch, channels, height, width = images.shape
    rows = (offsets[:, :1] + torch.arange(height)).view(batch, 1, height, 1)
    columns = (offsets[:, 1:] + torch.arange(width)).view(batch, 1, 1, width)
    images = F.pad(images, (pad, pad, pad, pad))
    return images[torch.arange(batch).view(-1, 1, 1, 1), torch.arange(channels).view(1, -1, 1, 1), rows, columns]


def stratified_split(targets: Tensor, test_fraction: float) -> tuple[Tensor, Tensor]:
    """Indices of a training and a test part with the same share of every class; the same split every time."""
    generator = torch.Generator().manual_seed(0)
    train, test = [], []
    for target in targets.unique():
        members = torch.nonzero(targets == target).flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        count = round(len(members) * test_fraction)
        test.append(members[:count])
        train.append(members[count:])
    # Mixed, so that the first images of either part are of every class.
    return tuple(torch.cat(part)[torch.randperm(sum(map(len, part)), generator=generator)] for part in (train, test))
