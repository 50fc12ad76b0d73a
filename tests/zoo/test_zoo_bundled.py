"""Data that every Python carries: the text is real, the split is by file, broken installations are named."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from pipeoptim.errors import ConfigError
from pipeoptim_zoo.data.losses import IGNORE
from pipeoptim_zoo.data.stdlib_packages import PACKAGES, packages
from pipeoptim_zoo.data.stdlib_text import VOCABULARY, Windows, chars, decode, library_files, token_ids
from pipeoptim_zoo.data.unicode_names import SOURCE_LENGTH, characters, unicode_names
from pipeoptim_zoo.data.vocabulary import BEGIN, END


def library(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_targets_are_the_next_characters() -> None:
    x, y = chars(64, max_bytes=500_000).train_batch(3, 8)
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert len({tuple(row.tolist()) for row in x}) == 8


def test_the_text_is_python() -> None:
    task = chars(200, max_bytes=2_000_000)
    text = "".join(decode(row) for x, _ in list(task.validation_batches(50))[:4] for row in x)
    assert text.count("self") > 20
    assert text.count("def ") > 10
    assert text.count(VOCABULARY[-1]) < 0.05 * len(text)


def test_loading_is_quick() -> None:
    """A fraction of a second of this process's own time, whatever else the machine does; there is a wide margin."""
    start = time.process_time()
    chars(64, max_bytes=3_999_999)  # a size of its own: not from the cache
    assert time.process_time() - start < 3.0


def test_training_and_validation_come_from_different_files(tmp_path: Path) -> None:
    root = library(tmp_path, {f"m{i}.py": chr(ord("A") + i) * 1000 for i in range(26)})
    task = chars(10, max_bytes=26_000, root=str(root))
    sides = [set(decode(side.tokens)) for side in (task.train, task.validation) if isinstance(side, Windows)]
    assert len(sides) == 2
    assert not sides[0] & sides[1]
    assert len(sides[0] | sides[1]) == 26


def test_tests_and_site_packages_are_left_out(tmp_path: Path) -> None:
    library(tmp_path, {"os.py": "x", "test/t.py": "x", "email/__init__.py": "x", "site-packages/torch/a.py": "x", "a.txt": ""})
    assert {path.as_posix() for path in library_files(tmp_path)} == {"os.py", "email/__init__.py"}


def test_the_order_of_files_does_not_depend_on_the_folder(tmp_path: Path) -> None:
    names = {f"m{i}.py": "x" for i in range(20)}
    orders = [library_files(library(tmp_path / side, names)) for side in ("a", "b")]
    assert orders[0] == orders[1] != sorted(orders[0])


def test_a_library_without_sources_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no .py file"):
        chars(16, root=tmp_path)
    with pytest.raises(ConfigError, match="context=500 with max_bytes=100"):
        chars(500, max_bytes=100)
    with pytest.raises(ConfigError, match="package asyncio"):
        packages(16, root=library(tmp_path, {"os.py": "x"}))


def test_every_byte_has_an_id() -> None:
    ids = token_ids(bytes(range(256)))
    assert int(ids.max()) == len(VOCABULARY) - 1
    assert decode(token_ids(b"def f():\n\treturn 1\n")) == "def f():\n\treturn 1\n"
    assert decode(token_ids("é".encode())) == VOCABULARY[-1] * 2


def test_windows_cover_the_text_once_without_jitter() -> None:
    source = Windows(torch.arange(41, dtype=torch.uint8), context=8, jitter=False)
    x, y = source.batch(torch.arange(len(source)), None)
    assert x.flatten().tolist() == list(range(40))
    assert y.flatten().tolist() == list(range(1, 41))


def test_packages_are_balanced_and_told_apart_by_their_text(tmp_path: Path) -> None:
    files = {f"{name}/__init__.py": chr(ord("a") + i) * 1000 for i, name in enumerate(PACKAGES)}
    task = packages(20, root=str(library(tmp_path, files)))
    assert (len(task.train), len(task.validation)) == (400, 100)
    x, y = task.train_batch(0, 50)
    for row, label in zip(x, y, strict=True):
        assert decode(row - 1) == chr(ord("a") + int(label)) * 20


def test_unicode_pairs_are_packed() -> None:
    task = unicode_names()
    x, y = next(task.validation_batches(1))
    known = dict(characters())
    alphabet = {letter for pair in known.items() for text in pair for letter in text}
    assert len(alphabet) + 4 == task.vocab_size
    source, target = x[0, :SOURCE_LENGTH], x[0, SOURCE_LENGTH:]
    assert int(target[0]) == BEGIN
    length = int((y[0] != IGNORE).sum())
    assert int(y[0, length - 1]) == END
    assert torch.equal(target[1:length], y[0, : length - 1])
    assert not target[length:].any()
    description_sizes = {len(d) for d in known}
    assert int((source != 0).sum()) in description_sizes


def test_names_in_one_line_are_the_same_pairs() -> None:
    (x, y), (same, whole) = (unicode_names(seed=3, one_line=one_line).train_batch(5, 4) for one_line in (False, True))
    assert (
        torch.equal(x, same) and torch.equal(y, whole[:, SOURCE_LENGTH:]) and bool((whole[:, :SOURCE_LENGTH] == IGNORE).all())
    )


def test_unicode_names_are_the_same_everywhere() -> None:
    pairs = characters()
    assert len(pairs) == 11_487
    assert ("1D7D8 Nd <font> 0030", "MATHEMATICAL DOUBLE-STRUCK DIGIT ZERO") in pairs
