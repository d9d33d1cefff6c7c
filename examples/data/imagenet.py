"""ImageNet, or anything else laid out like it: `train/<class>/<image>` and `val/<class>/<image>`, classes in alphabetical order.

Images are decoded by torchvision where it is installed and by Pillow otherwise; cropping and resizing are the same for both.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SUFFIXES = {".jpeg", ".jpg", ".png"}


def load(path: Path, image_size: int = 224):
    """Training and test part from `path`, as `image_size` square images."""
    train, test = (FolderImages(path / part, image_size) for part in ("train", "val"))
    if train.names != test.names:
        odd = sorted(set(train.names) ^ set(test.names))
        raise ValueError(f"dataset imagenet: expected the same class folders in {path}/train and {path}/val; only one has {odd[:5]}")
    return train, test


class FolderImages:
    """Images of one folder per class. Training images get a random crop (8 to 100 % of the area, aspect 3/4 to 4/3) and are mirrored half
    of the time (arXiv 1409.4842, section 6); the others their middle, with the short side enlarged to 256/224 of `size` before."""

    channels = 3

    def __init__(self, folder: Path, size: int):
        if not folder.is_dir():
            raise FileNotFoundError(
                f"dataset imagenet: expected the folder {folder} with one folder per class; there is none; "
                f"fetch it with: python examples/download_data.py --dataset imagenet --data-path {folder.parent}"
            )
        self.names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
        self.files, targets = [], []
        for target, name in enumerate(self.names):
            found = sorted(file for file in (folder / name).iterdir() if file.suffix.lower() in SUFFIXES)
            if not found:
                raise ValueError(f"dataset imagenet: expected images ({', '.join(sorted(SUFFIXES))}) in {folder / name}; got none")
            self.files += found
            targets += [target] * len(found)
        if not self.files:
            raise ValueError(f"dataset imagenet: expected one folder per class in {folder}; got none")
        self.targets, self.classes, self.size = torch.tensor(targets), len(self.names), size
        self.mean, self.std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))

    def __len__(self) -> int:
        return len(self.files)

    def batch(self, indices: Tensor, draw: int | None = None) -> tuple[Tensor, Tensor]:
        """Normalized images and targets of `indices`, augmented by random draw number `draw` unless it is None."""
        images = torch.empty((len(indices), 3, self.size, self.size), dtype=torch.uint8)
        for slot, index in enumerate(indices.tolist()):
            image = decode(self.files[index])
            random = None if draw is None else np.random.default_rng((draw, index))
            images[slot] = _middle(image, self.size) if random is None else _random_crop(image, self.size, random)
        return (images.float().div_(255) - self.mean) / self.std, self.targets[indices]


def decode(file: Path) -> Tensor:
    """uint8 `Tensor[3, H, W]` of an image file; ValueError if it is damaged."""
    try:
        try:
            from torchvision.io import ImageReadMode, decode_image
        except ImportError:
            from PIL import Image

            with Image.open(file) as image:
                return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        return decode_image(torch.from_numpy(np.fromfile(file, np.uint8)), ImageReadMode.RGB)
    except (OSError, RuntimeError, ValueError, SyntaxError) as error:  # SyntaxError: Pillow's word for a broken PNG
        raise ValueError(f"dataset imagenet: {file} is damaged: expected a JPEG or PNG image; got {error}") from error


def _resize(image, height, width):
    return F.interpolate(image.unsqueeze(0), size=(height, width), mode="bilinear", antialias=True, align_corners=False)[0]


def _random_crop(image, size, random):
    height, width = image.shape[1:]
    for _ in range(10):
        area = height * width * random.uniform(0.08, 1)
        aspect = np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3)))
        h, w = round(np.sqrt(area / aspect)), round(np.sqrt(area * aspect))
        if 0 < h <= height and 0 < w <= width:
            top, left = random.integers(height - h, endpoint=True), random.integers(width - w, endpoint=True)
            break
    else:
        # A very long image: its middle square.
        h = w = min(height, width)
        top, left = (height - h) // 2, (width - w) // 2
    image = _resize(image[:, top : top + h, left : left + w], size, size)
    return image.flip(2) if random.random() < 0.5 else image


def _middle(image, size):
    height, width = image.shape[1:]
    scale = round(size * 256 / 224) / min(height, width)
    image = _resize(image, max(size, round(height * scale)), max(size, round(width * scale)))
    top, left = (image.shape[1] - size) // 2, (image.shape[2] - size) // 2
    return image[:, top : top + size, left : left + size]
