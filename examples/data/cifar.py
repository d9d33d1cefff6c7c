"""CIFAR-10 and CIFAR-100 in their binary format (https://www.cs.toronto.edu/~kriz/cifar.html): records of one label byte (CIFAR-100: a
coarse and a fine one) and 3,072 pixel bytes, red, green and blue planes of 32x32."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .images import TensorImages

PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class Layout:
    """Where a CIFAR data set lies and what its files hold."""

    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    records: tuple[int, int]  # in each training file, in each test file
    label_bytes: int
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


LAYOUTS = {
    "cifar10": Layout(
        "cifar-10-batches-bin", tuple(f"data_batch_{i}.bin" for i in range(1, 6)), ("test_batch.bin",), (10_000, 10_000), 1, 10,
        (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616),
    ),
    "cifar100": Layout(
        "cifar-100-binary", ("train.bin",), ("test.bin",), (50_000, 10_000), 2, 100,
        (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762),
    ),
}  # fmt: skip


def load(name: str, path: Path):
    """Training and test part of `name` from `path`, which holds the official folder or is it."""
    layout = LAYOUTS[name]
    folder = path / layout.folder if (path / layout.folder).is_dir() else path
    parts = []
    for files, records, train in ((layout.train, layout.records[0], True), (layout.test, layout.records[1], False)):
        images, targets = zip(*(read_records(folder / file, layout, records, name) for file in files), strict=True)
        pad, flip = (4, True) if train else (0, False)
        parts.append(TensorImages(torch.cat(images), torch.cat(targets), layout.classes, layout.mean, layout.std, pad, flip))
    return tuple(parts)


def read_records(file: Path, layout: Layout, records: int, name: str):
    """Images and targets of one file. FileNotFoundError if it is not there, ValueError if it is not `records` valid records long."""
    fetch = f"fetch it with: python examples/download_data.py --dataset {name} --data-path {_root(file, layout)}"
    if not file.is_file():
        raise FileNotFoundError(f"dataset {name}: expected the file {file} ({records} records); there is none; {fetch}")
    length = layout.label_bytes + PIXELS
    size = file.stat().st_size
    if size != records * length:
        raise ValueError(f"dataset {name}: {file} is damaged: expected {records * length} bytes ({records} records); got {size}; {fetch}")
    table = torch.from_numpy(np.fromfile(file, np.uint8).reshape(records, length))
    targets = table[:, layout.label_bytes - 1].long()
    wrong = torch.nonzero(targets >= layout.classes).flatten()
    if len(wrong):
        record = int(wrong[0])
        label = f"{int(targets[record])} in record {record}"
        raise ValueError(f"dataset {name}: {file} is damaged: expected labels below {layout.classes}; got {label}; {fetch}")
    return table[:, layout.label_bytes :].reshape(records, 3, 32, 32), targets


def _root(file, layout):
    return file.parent.parent if file.parent.name == layout.folder else file.parent
