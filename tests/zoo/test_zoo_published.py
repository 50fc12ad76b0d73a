"""Data sets in the formats they are published in, written small by the tests."""

from __future__ import annotations

import io
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeoptim.errors import ConfigError
from pipeoptim_zoo.data.cifar import cifar100
from pipeoptim_zoo.data.imdb import imdb
from pipeoptim_zoo.data.losses import IGNORE
from pipeoptim_zoo.data.tiny_imagenet import tiny_imagenet
from pipeoptim_zoo.data.vocabulary import BEGIN, END
from pipeoptim_zoo.data.wmt import EncodedLines, Vocabulary, wmt16

# CIFAR-100


def write_cifar(root: Path, count: int = 12) -> np.ndarray[Any, Any]:
    folder = root / "cifar-100-binary"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (count, 3072), dtype=np.uint8)
    records = b"".join(bytes([0, n]) + row.tobytes() for n, row in enumerate(pixels))  # superclass, class, planes
    for name in ("train.bin", "test.bin"):
        (folder / name).write_bytes(records)
    return pixels


def test_cifar_reads_planes_of_32_by_32(tmp_path: Path) -> None:
    pixels = write_cifar(tmp_path)
    task = cifar100(tmp_path, augment=False)
    x, y = task.train_batch(0, 12)
    assert x.shape == (12, 3, 32, 32)
    mean, std = torch.tensor([0.5071, 0.4865, 0.4409]), torch.tensor([0.2673, 0.2564, 0.2762])
    restored = (x * std.view(3, 1, 1) + mean.view(3, 1, 1)) * 255
    expected = torch.from_numpy(pixels).view(12, 3, 32, 32)[y].float()
    torch.testing.assert_close(restored, expected, atol=1e-3, rtol=0)


def test_cifar_augments_training_alone_and_repeatably(tmp_path: Path) -> None:
    write_cifar(tmp_path)
    plain, task, again = cifar100(tmp_path, augment=False), cifar100(tmp_path), cifar100(tmp_path)
    assert not torch.equal(task.train_batch(0, 6)[0], plain.train_batch(0, 6)[0])
    assert torch.equal(task.train_batch(5, 6)[0], again.train_batch(5, 6)[0])
    assert torch.equal(next(task.validation_batches(12))[0], next(plain.validation_batches(12))[0])


def test_cifar_can_be_enlarged(tmp_path: Path) -> None:
    write_cifar(tmp_path)
    assert cifar100(tmp_path, input_size=64).train_batch(0, 2)[0].shape == (2, 3, 64, 64)


def damage(content: bytes, kind: str) -> bytes:
    return {"cut": content[:1000], "empty": b"", "label": content[:1] + b"\x64" + content[2:], "pickle": pickle.dumps([1, 2])}[
        kind
    ]


@pytest.mark.parametrize("kind", ["cut", "empty", "label", "pickle"])
def test_damaged_cifar_is_named(tmp_path: Path, kind: str) -> None:
    write_cifar(tmp_path)
    path = tmp_path / "cifar-100-binary" / "test.bin"
    path.write_bytes(damage(path.read_bytes(), kind))
    with pytest.raises(ConfigError, match="test.bin has .*download it again"):
        cifar100(tmp_path)


def test_half_of_cifar_is_named(tmp_path: Path) -> None:
    write_cifar(tmp_path)
    (tmp_path / "cifar-100-binary" / "test.bin").unlink()
    with pytest.raises(ConfigError, match="test.bin is missing"):
        cifar100(tmp_path)


def test_the_version_of_cifar_that_is_pickles_is_not_opened(tmp_path: Path) -> None:
    """The version for Python is as common; whoever has it is told which one is read."""
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name in ("train", "test"):
        (folder / name).write_bytes(pickle.dumps({b"data": b""}))
    with pytest.raises(ConfigError, match=r"CIFAR-100 \(binary version\): .*cifar-100-binary"):
        cifar100(tmp_path)


# Tiny-ImageNet


def write_tiny_imagenet(root: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    folder = root / "tiny-imagenet-200"
    names = ["n02", "n01"]  # the order of wnids.txt is not alphabetical
    (folder / "val" / "images").mkdir(parents=True)
    (folder / "wnids.txt").write_text("\n".join(names) + "\n")
    rows = []
    for label, name in enumerate(names):
        images = folder / "train" / name / "images"
        images.mkdir(parents=True)
        (folder / "train" / name / f"{name}_boxes.txt").write_text("")
        for number in range(3):
            image.new("RGB", (64, 64), (100 * label, 50, 200)).save(images / f"{name}_{number}.JPEG", "JPEG")
    image.new("L", (64, 64), 120).save(folder / "val" / "images" / "val_0.JPEG", "JPEG")
    image.new("RGB", (64, 64), (10, 10, 10)).save(folder / "val" / "images" / "val_1.JPEG", "JPEG")
    rows = ["val_0.JPEG\tn01\t0\t0\t62\t62", "val_1.JPEG\tn02\t1\t1\t60\t60"]
    (folder / "val" / "val_annotations.txt").write_text("\n".join(rows) + "\n")


@pytest.mark.parametrize("cache", [False, True])
def test_tiny_imagenet_reads_folders_and_annotations(tmp_path: Path, cache: bool) -> None:
    write_tiny_imagenet(tmp_path)
    task = tiny_imagenet(tmp_path, augment=False, cache=cache)
    for _ in range(2):
        x, y = task.train_batch(0, 6)
        assert x.shape == (6, 3, 64, 64)
        assert sorted(y.tolist()) == [0, 0, 0, 1, 1, 1]
        red = (x[:, 0].mean((1, 2)) * 0.2770 + 0.4802) * 255
        torch.testing.assert_close(red, 100.0 * y, atol=3.0, rtol=0)
    labels = {int(y): x for x, y in task.validation_batches(1)}
    grey = labels[1][0].flatten(1).mean(1) * torch.tensor([0.2770, 0.2691, 0.2821]) + torch.tensor([0.4802, 0.4481, 0.3975])
    torch.testing.assert_close(grey * 255, torch.full((3,), 120.0), atol=2.0, rtol=0)


def test_tiny_imagenet_with_missing_parts_is_named(tmp_path: Path) -> None:
    write_tiny_imagenet(tmp_path)
    folder = tmp_path / "tiny-imagenet-200"
    (folder / "train" / "n01" / "images" / "n01_0.JPEG").write_bytes(b"not a picture")
    with pytest.raises(ConfigError, match="n01_0.JPEG cannot be read"):
        tiny_imagenet(tmp_path).train_batch(0, 6)
    (folder / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn99\t0\n")
    with pytest.raises(ConfigError, match="n99"):
        tiny_imagenet(tmp_path)
    (folder / "val" / "val_annotations.txt").unlink()
    with pytest.raises(ConfigError, match="val_annotations.txt is not there"):
        tiny_imagenet(tmp_path)


# IMDb


REVIEWS = {
    "train/pos/0_9.txt": "A good film.<br /><br />Good!",
    "train/pos/1_8.txt": "good it's",
    "train/neg/0_2.txt": "bad",
    "train/neg/1_1.txt": "A bad, bad film",
    "test/pos/0_10.txt": "good unseen",
    "test/neg/0_1.txt": "bad",
    "train/unsup/0_0.txt": "not used",
    "README.txt": "not used",
}


def write_imdb(root: Path, archive: bool) -> None:
    if not archive:
        for name, text in REVIEWS.items():
            path = root / "aclImdb" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return
    with tarfile.open(root / "aclImdb_v1.tar.gz", "w:gz") as out:
        for name, text in reversed(REVIEWS.items()):
            member = tarfile.TarInfo(f"aclImdb/{name}")
            member.size = len(text)
            out.addfile(member, io.BytesIO(text.encode()))


@pytest.mark.parametrize("archive", [False, True])
def test_imdb_reads_folder_and_archive_alike(tmp_path: Path, archive: bool) -> None:
    write_imdb(tmp_path, archive)
    task = imdb(tmp_path, context=6)
    x, y = task.train.batch(torch.arange(4), None)
    assert y.tolist() == [0, 0, 1, 1]
    # bad 3, good 3, then a, film 2, then ! . it's once: ids from 4 on
    assert x.tolist() == [[4, 0, 0, 0, 0, 0], [6, 4, 4, 7, 0, 0], [6, 5, 7, 9, 5, 8], [5, 10, 0, 0, 0, 0]]
    assert task.vocab_size == 11
    held_out, labels = task.validation.batch(torch.arange(2), None)
    assert held_out[:, :2].tolist() == [[4, 0], [5, 1]]
    assert labels.tolist() == [0, 1]
    assert list(tmp_path.iterdir()) == [tmp_path / ("aclImdb_v1.tar.gz" if archive else "aclImdb")]


def test_imdb_with_missing_parts_is_named(tmp_path: Path) -> None:
    write_imdb(tmp_path, archive=False)
    (tmp_path / "aclImdb" / "test" / "neg" / "0_1.txt").unlink()
    with pytest.raises(ConfigError, match="test/neg has no .txt"):
        imdb(tmp_path)
    broken = tmp_path / "aclImdb_v1.tar.gz"
    broken.write_bytes(b"\x1f\x8b nothing")
    with pytest.raises(ConfigError, match="cannot be read as an archive"):
        imdb(broken)


# WMT-16


def write_wmt(root: Path, stem: str = "train", check: str = "newstest2014") -> None:
    (root / f"{stem}.en").write_text("the cat\n\nthe very very long sentence here\nthe dog sleeps\n")
    (root / f"{stem}.de").write_text("die Katze\nleer\nder sehr lange Satz\nder Hund schläft\n")
    (root / f"{check}.en").write_text("the cat sleeps and sleeps")
    (root / f"{check}.de").write_text("die Katze schläft und schläft und schläft")


@pytest.mark.parametrize(("stem", "check"), [("train", "valid"), ("train.tok.clean.bpe.32000", "newstest2014.tok.bpe.32000")])
def test_wmt_pairs_are_packed(tmp_path: Path, stem: str, check: str) -> None:
    write_wmt(tmp_path, stem, check)
    task = wmt16(tmp_path, source_length=4, target_length=5)
    assert (len(task.train), len(task.validation)) == (2, 1)  # the empty and the long line are left out
    assert isinstance(task.train.sources, EncodedLines)  # type: ignore[attr-defined]
    words = task.train.sources.vocabulary  # type: ignore[attr-defined]
    x, y = task.train.batch(torch.tensor([0, 1]), None)
    assert [words.decode(row[:4].tolist()) for row in x] == [["the", "cat"], ["the", "dog", "sleeps"]]
    assert [words.decode(row.tolist()) for row in y[:, :3]] == [["die", "Katze"], ["der", "Hund", "schläft"]]
    assert x[0, 4:].tolist() == [BEGIN, *words.encode(["die", "Katze"]), 0, 0]
    assert y[0].tolist() == [*words.encode(["die", "Katze"]), END, IGNORE, IGNORE]
    x, y = next(task.validation_batches(1))
    assert y[0].tolist() == [*words.encode(["die", "Katze", "schläft", "und"]), END]  # cut, not dropped


def test_wmt_uses_the_published_vocabulary(tmp_path: Path) -> None:
    write_wmt(tmp_path)
    (tmp_path / "vocab.bpe.32000").write_text("<pad>\n<unk>\n<s>\n<\\s>\nthe\ncat\ndie\n")
    task = wmt16(tmp_path)
    assert task.vocab_size == 7
    assert task.train.batch(torch.tensor([0]), None)[0][0, :2].tolist() == [4, 5]


def test_wmt_files_must_belong_together(tmp_path: Path) -> None:
    write_wmt(tmp_path)
    (tmp_path / "train.de").write_text("nur eine Zeile\n")
    with pytest.raises(ConfigError, match="4 lines and .* has 1"):
        wmt16(tmp_path)


@pytest.mark.parametrize("text", ["", "\n", "a", "a\n", "a\n\nb c", "ä ö\n\n", "a b  \n c\n"])
def test_lines_are_those_of_the_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "lines"
    path.write_text(text)
    lines = EncodedLines(path, Vocabulary.build([text.split()], 20))
    expected = text.split("\n")[: -1 if text.endswith("\n") or not text else None]
    assert len(lines) == len(expected)
    assert [lines.vocabulary.decode(lines[i]) for i in range(len(lines))] == [line.split() for line in expected]
    if "  " not in text:
        assert lines.word_counts().tolist() == [len(line.split()) for line in expected]


# What a newcomer sees first


@pytest.mark.parametrize(
    ("load", "words"),
    [
        (cifar100, ("CIFAR-100", "cifar-100-binary/train.bin", "University of Toronto")),
        (tiny_imagenet, ("Tiny-ImageNet", "tiny-imagenet-200/wnids.txt", "CS231n")),
        (imdb, ("IMDb", "aclImdb/train", "Stanford")),
        (wmt16, ("WMT-16 En-De", "train.en", "translation task")),
    ],
)
def test_missing_data_says_what_to_download_and_where_it_must_lie(tmp_path: Path, load: Any, words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as error:
        load(tmp_path / "absent")
    message = str(error.value)
    assert all(word in message for word in (*words, "download", str(tmp_path))), message
    assert "\n" not in message
