"""Files that are not what was written: flipped bits, and everything else that can happen to a file."""

from __future__ import annotations

import os
import random
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from pipeline import manifest as manifests
from pipeline.errors import ArtifactError

Harm = Callable[[Path, Path], None]
"""Harms a file, given another of the same directory."""


def flips(directories: list[Path], count: int, seed: int) -> Iterator[bool]:
    """Flip single bits, each as likely, one after another; yields whether a stage directory that is to be used is
    refused with the file named."""
    files = [(directory, path) for directory in directories for path in manifests.walk(directory)]
    sizes = [path.stat().st_size for _, path in files]
    generator = random.Random(seed)
    for directory, path in generator.choices(files, sizes, k=count):
        position, bit = generator.randrange(path.stat().st_size), 1 << generator.randrange(8)
        _exclusive_or(path, position, bit)
        yield refused(directory, path.name)
        _exclusive_or(path, position, bit)
    for directory in directories:
        manifests.verify(directory)  # all is as it was


def refused(directory: Path, *names: str) -> bool:
    """Whether a stage directory is refused before its use, and one of the files that were harmed is named."""
    try:
        manifests.verify(directory)
    except ArtifactError as error:
        return any(name in f"{error.where} {error.what}" for name in names)
    return False


def truncate_half(path: Path, other: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def truncate(path: Path, other: Path) -> None:
    os.truncate(path, 0)


def lengthen(path: Path, other: Path) -> None:
    with path.open("ab") as stream:
        stream.write(b"\n")


def remove(path: Path, other: Path) -> None:
    path.unlink()


def swap(path: Path, other: Path) -> None:
    aside = path.with_name("aside")
    path.rename(aside)
    other.rename(path)
    aside.rename(other)


def link(path: Path, other: Path) -> None:
    """To the very bytes that were there."""
    kept = path.parents[2] / f"kept-{path.name}"
    path.rename(kept)
    path.symlink_to(kept)


def fifo(path: Path, other: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def folder(path: Path, other: Path) -> None:
    path.unlink()
    path.mkdir()


def unix_socket(path: Path, other: Path) -> None:
    path.unlink()
    folder = os.open(path.parent, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(f"/proc/self/fd/{folder}/{path.name}")  # the path of a socket may have few characters only
    os.close(folder)


def add(path: Path, other: Path) -> None:
    path.with_name(f"{path.name}.bin").write_bytes(path.read_bytes())


HARMS = (truncate_half, truncate, lengthen, remove, swap, link, fifo, folder, unix_socket, add)


def faults(directories: list[Path], root: Path) -> Iterator[tuple[str, str, bool]]:
    """Harm every file of stage directories in every way; yields harm, file, and whether it was refused by name."""
    for directory in directories:
        names = [path.relative_to(directory) for path in manifests.walk(directory)]
        for number, name in enumerate(names):
            for harm in HARMS:
                copy = Path(shutil.copytree(directory, root / "harmed" / directory.name))
                other = names[number - 1]
                harm(copy / name, copy / other)
                harmed = [name.name, other.name] if harm is swap else [name.name]
                yield harm.__name__, str(name), refused(copy, *harmed)
                shutil.rmtree(root / "harmed")


def _exclusive_or(path: Path, position: int, bit: int) -> None:
    with path.open("r+b") as stream:
        stream.seek(position)
        (byte,) = stream.read(1)
        stream.seek(position)
        stream.write(bytes([byte ^ bit]))
