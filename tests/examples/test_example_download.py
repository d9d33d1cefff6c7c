import hashlib
import io
import sys
import tarfile
from types import SimpleNamespace

import data
import download_data
import numpy as np
import pytest
from data import cifar

RECORD = 3073


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """CIFAR-10's archive with ten images in each file, one of each class, beside a file that must not be unpacked; its URL and MD5."""
    import dataclasses

    monkeypatch.setitem(cifar.LAYOUTS, "cifar10", dataclasses.replace(cifar.LAYOUTS["cifar10"], records=(10, 10)))
    layout = cifar.LAYOUTS["cifar10"]
    file = tmp_path / "cifar-10-binary.tar.gz"
    with tarfile.open(file, "w:gz") as tar:
        for name in (*(f"{layout.folder}/{name}" for name in layout.train + layout.test), "../outside.bin"):
            records = np.random.default_rng(0).integers(0, 256, (10, RECORD), dtype=np.uint8)
            records[:, 0] = range(10)
            member = tarfile.TarInfo(name)
            member.size = records.size
            tar.addfile(member, io.BytesIO(records.tobytes()))
    return file.as_uri(), hashlib.md5(file.read_bytes()).hexdigest()


def test_archive(archive, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(download_data.ARCHIVES, "cifar10", archive)
    folder = tmp_path / "sets" / "deep"
    download_data.main(["--dataset", "cifar10", "--data-path", str(folder)])
    assert "50 training and 10 test images of 10 classes" in capsys.readouterr().out
    assert sorted(entry.name for entry in folder.iterdir()) == ["cifar-10-batches-bin"]
    assert not (tmp_path / "sets" / "outside.bin").exists()
    download_data.main(["--dataset", "cifar10", "--data-path", str(folder), "--check"])
    file = folder / "cifar-10-batches-bin" / "test_batch.bin"
    records = bytearray(file.read_bytes())
    records[0] = 1  # a valid label, and one too many of its class
    file.write_bytes(records)
    with pytest.raises(ValueError, match="cifar10: expected as many test images of every class; got between 0 and 2"):
        download_data.main(["--dataset", "cifar10", "--data-path", str(folder), "--check"])


def test_archive_with_another_checksum(archive, tmp_path):
    with pytest.raises(ValueError, match=r"expected MD5 0{32}; got [0-9a-f]{32}"):
        download_data.fetch_archive(archive[0], "0" * 32, tmp_path)
    assert not list(tmp_path.glob("*.part"))
    assert not (tmp_path / "cifar-10-batches-bin").exists()


def test_what_a_download_lacks_is_said_in_a_line(archive, told, tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.touch()
    flags = ["--dataset", "cifar10", "--data-path"]
    for name in ("file", "new/folder"):
        status, text = told(download_data, *flags, tmp_path / name, "--check")
        assert status == 2 and text.startswith("download_data.py: dataset cifar10: expected the file ")
    status, text = told(download_data, *flags, file)
    assert status == 2 and "--data-path: expected a folder: [Errno " in text and str(file) in text
    monkeypatch.setitem(download_data.ARCHIVES, "cifar10", (archive[0], "0" * 32))
    status, text = told(download_data, *flags, tmp_path / "sets")
    assert status == 2 and "--dataset cifar10: file://" in text and "expected MD5 000" in text
    monkeypatch.setitem(download_data.ARCHIVES, "cifar10", ("http://localhost:1/cifar.tar.gz", "0" * 32))  # where nobody listens
    status, text = told(download_data, *flags, tmp_path / "sets")
    assert status == 2 and "--dataset cifar10: <urlopen error" in text and "http://localhost:1/cifar.tar.gz" in text
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    status, text = told(download_data, "--dataset", "imagenet", "--data-path", tmp_path)
    assert status == 2 and text.endswith("--dataset imagenet needs packages that are not installed: pip install huggingface_hub pyarrow")


def test_errors_of_the_checks_name_the_data_set(archive, told, tmp_path, monkeypatch):
    monkeypatch.setitem(download_data.ARCHIVES, "cifar10", archive)
    flags = ["--dataset", "cifar10", "--data-path", tmp_path]
    assert told(download_data, *flags)[0] == 0
    file = tmp_path / "cifar-10-batches-bin" / "test_batch.bin"
    file.write_bytes(b"\1" + file.read_bytes()[1:])
    status, text = told(download_data, *flags, "--check")
    assert status == 2 and text.startswith("download_data.py: dataset cifar10: expected as many test images of every class; got ")


def test_check_of_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train.bin .*download_data.py --dataset cifar100"):
        download_data.main(["--dataset", "cifar100", "--data-path", str(tmp_path / "new"), "--check"])
    assert not (tmp_path / "new").exists()  # which only looks


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with two shards of two PNGs each, in place of the packages that reach the real one; the names of shards it was asked for."""
    image = pytest.importorskip("PIL.Image")

    def png(value):
        stream = io.BytesIO()
        image.fromarray(np.full((40, 40, 3), value, np.uint8)).save(stream, "png")
        return stream.getvalue()

    names = ["data/train-00000-of-00001.parquet", "data/validation-00000-of-00001.parquet"]
    digest = hashlib.sha256(b"shard").hexdigest()
    siblings = [SimpleNamespace(rfilename=name, lfs=SimpleNamespace(sha256=digest)) for name in names]
    siblings.append(SimpleNamespace(rfilename="data/test-00000-of-00001.parquet", lfs=None))
    asked = []

    def download(repository, name, repo_type, local_dir):
        asked.append(name)
        file = local_dir / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"shard")
        return str(file)

    class Table:
        def __init__(self, file):
            self.file = file

        def iter_batches(self, batch_size, columns):
            yield SimpleNamespace(to_pylist=lambda: [{"image": {"bytes": png(50 + 100 * label)}, "label": label} for label in (0, 1)])

    api = SimpleNamespace(dataset_info=lambda repository, files_metadata: SimpleNamespace(siblings=siblings))
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(HfApi=lambda: api, hf_hub_download=download))
    monkeypatch.setitem(sys.modules, "pyarrow", SimpleNamespace(parquet=SimpleNamespace(ParquetFile=Table)))
    return siblings, asked


def test_imagenet(hub, told, tmp_path):
    siblings, asked = hub
    download_data.fetch_imagenet(tmp_path)
    download_data.fetch_imagenet(tmp_path)
    assert len(asked) == 2
    train, test = data.load("imagenet", tmp_path, 32)
    assert (len(train), len(test), train.names) == (2, 2, ["0000", "0001"])
    with pytest.raises(ValueError, match=r"train: expected 1281167 images of 1000 classes; got 2 of 2"):
        download_data.check("imagenet", tmp_path)
    status, text = told(download_data, "--dataset", "imagenet", "--data-path", tmp_path, "--check")
    assert status == 2 and text.startswith("download_data.py: dataset imagenet: ") and text.endswith("got 2 of 2")


def test_imagenet_damaged_shard(hub, tmp_path):
    siblings, _ = hub
    siblings[0].lfs.sha256 = "0" * 64
    with pytest.raises(ValueError, match=r"train-00000-of-00001.parquet: expected SHA-256 0{64}; got [0-9a-f]{64}"):
        download_data.fetch_imagenet(tmp_path)
    assert not (tmp_path / "train").exists()
