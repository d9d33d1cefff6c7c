import dataclasses
import sys

import data
import numpy as np
import pytest
import torch
from data import Loader, Subset, cifar, imagenet
from data.images import TensorImages, shift, stratified_split

RECORDS = (7, 5)


@pytest.fixture(params=["cifar10", "cifar100"])
def cifar_files(request, tmp_path, monkeypatch):
    """A CIFAR folder of a few records a file: (name, root, layout, pixels and labels of every file)."""
    layout = dataclasses.replace(cifar.LAYOUTS[request.param], records=RECORDS)
    monkeypatch.setitem(cifar.LAYOUTS, request.param, layout)
    (tmp_path / layout.folder).mkdir()
    random, written = np.random.default_rng(0), {}
    for files, records in zip((layout.train, layout.test), RECORDS, strict=True):
        for file in files:
            table = random.integers(0, 256, (records, layout.label_bytes + 3072), dtype=np.uint8)
            table[:, : layout.label_bytes] %= layout.classes
            table.tofile(tmp_path / layout.folder / file)
            written[file] = table
    return request.param, tmp_path, layout, written


@pytest.mark.parametrize("inside", [False, True])
def test_cifar_reads_what_was_written(cifar_files, inside):
    name, root, layout, written = cifar_files
    train, test = data.load(name, root / layout.folder if inside else root)
    for part, files in ((train, layout.train), (test, layout.test)):
        table = torch.from_numpy(np.concatenate([written[file] for file in files]))
        images, targets = part.batch(torch.arange(len(part)))
        assert torch.equal(targets, table[:, layout.label_bytes - 1].long())
        pixels = images * torch.tensor(layout.std).view(1, 3, 1, 1) + torch.tensor(layout.mean).view(1, 3, 1, 1)
        torch.testing.assert_close(pixels, table[:, layout.label_bytes :].reshape(-1, 3, 32, 32) / 255, atol=1e-6, rtol=0)
        assert part.classes == layout.classes


def test_cifar_missing_file(cifar_files):
    name, root, layout, _ = cifar_files
    (root / layout.folder / layout.test[0]).unlink()
    command = f"python examples/download_data.py --dataset {name} --data-path {root}"
    with pytest.raises(FileNotFoundError, match=rf"{layout.test[0]}.*there is none.*{command}"):
        data.load(name, root)


def test_cifar_truncated_file(cifar_files):
    name, root, layout, _ = cifar_files
    file = root / layout.folder / layout.train[0]
    file.write_bytes(file.read_bytes()[:-1])
    expected = RECORDS[0] * (layout.label_bytes + 3072)
    with pytest.raises(ValueError, match=rf"{layout.train[0]} is damaged: expected {expected} bytes.*got {expected - 1}"):
        data.load(name, root)


def test_cifar_label_out_of_range(cifar_files):
    name, root, layout, written = cifar_files
    written[layout.test[0]][3, layout.label_bytes - 1] = 200
    written[layout.test[0]].tofile(root / layout.folder / layout.test[0])
    with pytest.raises(ValueError, match=rf"{layout.test[0]} is damaged: expected labels below {layout.classes}; got 200 in record 3"):
        data.load(name, root)


def test_cifar_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data_batch_1.bin.*there is none"):
        data.load("cifar10", tmp_path / "nowhere")


@pytest.fixture
def image_folders(tmp_path):
    """Folders in ImageNet's layout: two classes of PNGs, each a plain color with a bright corner."""
    image = pytest.importorskip("PIL.Image")
    for part, per_class in (("train", 3), ("val", 2)):
        for target, name in enumerate(("cat", "dog")):
            (tmp_path / part / name).mkdir(parents=True)
            for index in range(per_class):
                pixels = np.full((40 + 8 * index, 64, 3), (60 + 100 * target, 20 * index, 90), np.uint8)
                pixels[:4, :4] = 255
                image.fromarray(pixels).save(tmp_path / part / name / f"{index}.png")
    return tmp_path


def test_imagenet_folders(image_folders):
    train, test = data.load("imagenet", image_folders, image_size=32)
    assert (len(train), len(test), train.classes, train.names) == (6, 4, 2, ["cat", "dog"])
    images, targets = test.batch(torch.arange(4))
    assert images.shape == (4, 3, 32, 32) and targets.tolist() == [0, 0, 1, 1]
    red = images[:, 0, 16, 16] * imagenet.STD[0] + imagenet.MEAN[0]
    torch.testing.assert_close(red, torch.tensor([60, 60, 160, 160]) / 255, atol=2e-3, rtol=0)


@pytest.mark.third_party
def test_imagenet_decoders_agree(image_folders, monkeypatch):
    file = image_folders / "train" / "cat" / "1.png"
    by_torchvision = imagenet.decode(file)
    monkeypatch.setitem(sys.modules, "torchvision.io", None)
    assert torch.equal(by_torchvision, imagenet.decode(file))


def test_imagenet_errors(image_folders):
    with pytest.raises(FileNotFoundError, match=r"expected the folder .*none/train.*download_data.py --dataset imagenet"):
        data.load("imagenet", image_folders / "none")
    broken = image_folders / "train" / "cat" / "1.png"
    broken.write_bytes(broken.read_bytes()[:50])
    train, _ = data.load("imagenet", image_folders, 32)
    with pytest.raises(ValueError, match=r"1.png is damaged: expected a JPEG or PNG image"):
        train.batch(torch.tensor([1]))
    (image_folders / "val" / "emu").mkdir()
    with pytest.raises(ValueError, match=r"expected images .* in .*val/emu; got none"):
        data.load("imagenet", image_folders)
    (image_folders / "val" / "emu" / "0.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"only one has \['emu'\]"):
        data.load("imagenet", image_folders)


def test_embedded_sets():
    for name, sizes in (("mnist5k", (4000, 1000)), ("digits", (1438, 359))):
        parts = data.load(name)
        assert tuple(map(len, parts)) == sizes
        for part in parts:
            assert part.images.shape[1:] == (1, 32, 32) and part.classes == 10
            counts = part.targets.bincount(minlength=10)
            assert counts.max() - counts.min() <= 0.06 * counts.max()
        images, _ = parts[0].batch(torch.arange(len(parts[0])))
        assert abs(images.mean()) < 0.01 and abs(images.std() - 1) < 0.01


def test_unknown_name():
    with pytest.raises(ValueError, match="dataset must be one of mnist5k, .*got 'svhn'"):
        data.load("svhn")


def test_split_is_stratified_and_fixed():
    targets = torch.tensor([0] * 50 + [1] * 100)
    train, test = stratified_split(targets, 0.2)
    assert targets[test].bincount().tolist() == [10, 20]
    assert torch.equal(torch.cat([train, test]).sort().values, torch.arange(150))
    assert all(torch.equal(a, b) for a, b in zip(stratified_split(targets, 0.2), (train, test), strict=True))


def test_shift_is_the_padded_crop():
    images = torch.arange(2 * 3 * 5 * 4).view(2, 3, 5, 4)
    offsets = torch.tensor([[0, 3], [2, 4]])
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    for image, (row, column), got in zip(padded, offsets.tolist(), shift(images, offsets, 2), strict=True):
        assert torch.equal(got, image[:, row : row + 5, column : column + 4])


def squares(count=23):
    images = torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return TensorImages(images, torch.arange(count) % 10, 10, [0.5], [0.25], pad=2, flip=True)


def same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_can_be_entered_anywhere(workers):
    loader = Loader(squares(), 5, True, seed=3, workers=workers)
    before = torch.get_rng_state()
    whole = list(loader.epoch(2))
    same(whole[3:], list(loader.epoch(2, 3)))
    same(whole, list(Loader(squares(), 5, True, seed=3).epoch(2)))
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(whole[0][2], next(loader.epoch(1))[2])
    assert not list(loader.epoch(2, len(loader)))


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_processes_share_the_work(world):
    train = [Loader(squares(), 3, True, rank=rank, world=world).plan(1) for rank in range(world)]
    assert len({tuple(map(len, plan)) for plan in train}) == 1
    seen = torch.cat([index for plan in train for index in plan])
    assert len(seen.unique()) == len(seen) == 23 // world * world
    loaders = [Loader(squares(), 3, False, rank=rank, world=world) for rank in range(world)]
    tested = [loader.plan(0) for loader in loaders]
    assert {len(plan) for plan in tested} == {len(loaders[0])}
    assert torch.equal(torch.cat([index for plan in tested for index in plan]).sort().values, torch.arange(23))


def test_augmentation_belongs_to_the_image_and_the_epoch():
    images = squares()
    both, _ = images.batch(torch.tensor([4, 9]), draw=11)
    alone, _ = images.batch(torch.tensor([9]), draw=11)
    assert torch.equal(both[1:], alone)
    assert not torch.equal(alone, images.batch(torch.tensor([9]), draw=12)[0])


def test_subset_is_spread():
    part = Subset(squares(), 4)
    assert part.indices.tolist() == [0, 7, 15, 22] and len(part) == 4
    same([part.batch(torch.tensor([1, 3]))], [squares().batch(torch.tensor([7, 22]))])
    assert len(Subset(squares(), 99)) == 23
