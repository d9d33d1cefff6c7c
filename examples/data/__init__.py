"""Data sets of the examples, by name, and the loader that feeds them.

A data set is anything with `classes`, `channels`, `__len__` and `batch(indices, draw)`, which returns `(images, targets)`: float
`Tensor[B, C, H, W]`, normalized, and int64 `Tensor[B]`. `draw` is None for plain images, or the number of the random draw that augments
them: the same draw gives the same images, whoever asks and in whatever order.
"""

from pathlib import Path

from . import cifar, imagenet, mnist
from .loader import Loader, Subset

__all__ = ["DATASETS", "Loader", "Subset", "load"]

# name: function of (path, image_size) returning (train, test)
DATASETS = {
    "mnist5k": lambda path, size: mnist.mnist5k(),
    "digits": lambda path, size: mnist.digits(),
    "cifar10": lambda path, size: cifar.load("cifar10", path),
    "cifar100": lambda path, size: cifar.load("cifar100", path),
    "imagenet": lambda path, size: imagenet.load(path, size),
}


def load(name: str, path: str | Path = "datasets", image_size: int = 224):
    """The training and the test part of data set `name`, from the folder `path` where it is not embedded in a package.

    Raises ValueError for a name that does not exist or a damaged file, FileNotFoundError for one that is missing.
    """
    if name not in DATASETS:
        raise ValueError(f"dataset must be one of {', '.join(DATASETS)}; got {name!r}")
    return DATASETS[name](Path(path), image_size)
