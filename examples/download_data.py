#!/usr/bin/env python3
"""Fetch a data set, or check the one on disk.

    python examples/download_data.py --dataset cifar10 --data-path datasets
    python examples/download_data.py --dataset cifar10 --data-path datasets --check
    hf auth login                                                             # once, after accepting ImageNet's terms on the hub
    python examples/download_data.py --dataset imagenet --data-path datasets  # needs: pip install huggingface_hub pyarrow

CIFAR comes from its authors' page, one archive whose MD5 is checked before anything is unpacked. ImageNet comes from the Hugging Face
hub in shards whose SHA-256 the hub publishes; each is checked, unpacked to `train/<class>/` and `val/<class>/`, and removed, and a
second call goes on after the last one finished.
"""

import argparse
import hashlib
import http.client
import sys
import tarfile
import urllib.request
from pathlib import Path

from tqdm import tqdm

import data
import files
from data.cifar import LAYOUTS
from said import blaming, said

ARCHIVES = {
    "cifar10": ("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"),
    "cifar100": ("https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8"),
}
HUB = "ILSVRC/imagenet-1k"
SPLITS = {"train": ("train", 1_281_167), "validation": ("val", 50_000)}  # the hub's name: our folder, images
CHUNK = 1 << 20


def main(argv: list[str] | None = None) -> None:
    """Do what `argv` says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, choices=[*ARCHIVES, "imagenet"])
    parser.add_argument("--data-path", type=Path, default=Path("datasets"), help="folder to put it into (default: datasets)")
    parser.add_argument("--check", action="store_true", help="only verify what is there")
    args = parser.parse_args(argv)
    if not args.check:
        with blaming("--data-path: expected a folder", OSError):
            args.data_path.mkdir(parents=True, exist_ok=True)
        with blaming(f"--dataset {args.dataset}", OSError, ValueError, http.client.HTTPException):  # the hub's errors are OSErrors
            if args.dataset == "imagenet":
                fetch_imagenet(args.data_path)
            else:
                fetch_archive(*ARCHIVES[args.dataset], args.data_path)
    print(check(args.dataset, args.data_path))


def fetch_archive(url: str, md5: str, folder: Path) -> None:
    """Download `url`, verify it, and unpack it into `folder`; ValueError if its MD5 is another."""
    archive = folder / url.rsplit("/", 1)[1]
    partial = archive.with_name(archive.name + ".part")
    found = hashlib.md5(usedforsecurity=False)
    with _opened(url) as source, partial.open("wb") as target:
        size = int(source.headers.get("Content-Length") or 0)
        with tqdm(total=size or None, unit="B", unit_scale=True, desc=archive.name) as bar:
            while chunk := source.read(CHUNK):
                found.update(chunk)
                target.write(chunk)
                bar.update(len(chunk))
    if found.hexdigest() != md5:
        partial.unlink()
        raise ValueError(f"{url}: expected MD5 {md5}; got {found.hexdigest()}; the download was deleted, try again")
    partial.replace(archive)
    with tarfile.open(archive) as tar:
        for member in tar:
            name = Path(member.name)
            # Files two levels deep and nothing else: no links, no absolute or climbing paths.
            if member.isfile() and len(name.parts) == 2 and ".." not in name.parts:
                files.write(folder / name, tar.extractfile(member).read())
    archive.unlink()


def _opened(url: str):
    try:
        return urllib.request.urlopen(url)
    except OSError as error:
        raise OSError(f"{error}: {url}") from error


def fetch_imagenet(folder: Path) -> None:
    """Every shard of ImageNet that `folder` lacks."""
    try:
        from huggingface_hub import HfApi, hf_hub_download
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError("--dataset imagenet needs packages that are not installed: pip install huggingface_hub pyarrow") from error
    siblings = HfApi().dataset_info(HUB, files_metadata=True).siblings
    shards = [file for file in siblings if file.rfilename.endswith(".parquet") and Path(file.rfilename).name.split("-")[0] in SPLITS]
    if not shards:
        raise ValueError(f"{HUB}: expected Parquet files named train-* and validation-*; got none: the hub's layout has changed")
    for shard in tqdm(sorted(shards, key=lambda file: file.rfilename), unit="shard"):
        name = Path(shard.rfilename).stem
        finished = folder / ".finished" / name
        if finished.exists():
            continue
        local = Path(hf_hub_download(HUB, shard.rfilename, repo_type="dataset", local_dir=folder / ".shards"))
        found = sha256(local)
        if found != shard.lfs.sha256:
            local.unlink()
            raise ValueError(f"{shard.rfilename}: expected SHA-256 {shard.lfs.sha256}; got {found}; the shard was deleted, try again")
        unpack(parquet.ParquetFile(local), folder / SPLITS[name.split("-")[0]][0], name)
        files.write(finished, b"")
        local.unlink()


def unpack(table, folder: Path, shard: str) -> None:
    """Images of a Parquet file to `folder/<class>/`. Classes are numbered as ImageNet's sorted WordNet names are."""
    index = 0
    for batch in table.iter_batches(batch_size=256, columns=["image", "label"]):
        for row in batch.to_pylist():
            files.write(folder / f"{row['label']:04d}" / f"{shard}-{index:05d}.jpeg", row["image"]["bytes"])
            index += 1


def check(dataset: str, folder: Path) -> str:
    """A line on the data set in `folder`; ValueError or FileNotFoundError if it is incomplete or damaged."""
    parts = data.load(dataset, folder)
    for part, name in zip(parts, ("training", "test"), strict=True):
        counts = part.targets.bincount(minlength=part.classes)
        if dataset in LAYOUTS and counts.min() != counts.max():
            raise ValueError(
                f"dataset {dataset}: expected as many {name} images of every class; got between {counts.min()} and {counts.max()}"
            )
    if dataset == "imagenet":
        for part, (name, images) in zip(parts, SPLITS.values(), strict=True):
            if len(part) != images or part.classes != 1000:
                raise ValueError(
                    f"dataset imagenet: {folder / name}: expected {images} images of 1000 classes; got {len(part)} of {part.classes}"
                )
            empty = next((file for file in part.files if file.stat().st_size == 0), None)
            if empty is not None:
                raise ValueError(f"dataset imagenet: {empty} is damaged: expected an image; got an empty file")
    return f"{dataset} in {folder}: {len(parts[0])} training and {len(parts[1])} test images of {parts[0].classes} classes"


def sha256(file: Path) -> str:
    """Hexadecimal digest of a file."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


if __name__ == "__main__":
    sys.exit(said(main))
