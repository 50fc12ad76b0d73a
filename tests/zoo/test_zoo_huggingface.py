"""Data sets through Hugging Face's ``datasets``: an extra, so these tests skip where it is not installed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeoptim.errors import ConfigError
from pipeoptim_zoo.data import huggingface
from pipeoptim_zoo.data.losses import IGNORE
from pipeoptim_zoo.data.vocabulary import BEGIN, END


def test_without_the_package_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match="pip install datasets"):
        huggingface.images("some/images")


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    pytest.importorskip("datasets")
    return tmp_path


def write_lines(folder: Path, splits: tuple[str, ...], rows: list[dict[str, Any]]) -> None:
    folder.mkdir()
    for split in splits:
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_images_from_a_folder_of_files(offline: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for split in ("train", "test"):
        for number, label in enumerate("ab"):
            folder = offline / "pets" / split / label
            folder.mkdir(parents=True)
            for copy in range(2):
                image.new("RGB", (16, 16), (128 * number, 0, 0)).save(folder / f"{copy}.png")
    task = huggingface.images(offline / "pets", padding=0, input_size=32)
    x, y = task.train_batch(0, 4)
    assert x.shape == (4, 3, 32, 32)
    assert task.classes == 2
    torch.testing.assert_close(x[:, 0].mean((1, 2)), (y * 128 / 255 - 0.5) / 0.25)


def test_texts_saved_to_disk(offline: Path) -> None:
    import datasets

    write_lines(offline / "files", ("train", "test"), [{"text": "good film", "label": 1}, {"text": "bad", "label": 0}])
    datasets.load_dataset(str(offline / "files")).save_to_disk(str(offline / "reviews"))
    task = huggingface.texts(offline / "reviews", context=3)
    x, y = task.validation.batch(torch.arange(2), None)
    assert x.tolist() == [[6, 5, 0], [4, 0, 0]]
    assert y.tolist() == [1, 0]
    with pytest.raises(ConfigError, match="columns"):
        huggingface.texts(offline / "reviews", text="body")


def test_translation_pairs(offline: Path) -> None:
    write_lines(offline / "pairs", ("train", "validation"), [{"translation": {"de": "die Katze", "en": "the cat"}}])
    task = huggingface.translation(offline / "pairs", source_length=3, target_length=4)
    x, y = task.train_batch(0, 1)
    assert x.tolist() == [[7, 5, 0, BEGIN, 6, 4, 0]]
    assert y.tolist() == [[6, 4, END, IGNORE]]
    with pytest.raises(ConfigError, match="'fr'"):
        huggingface.translation(offline / "pairs", languages=("en", "fr"))


def test_an_absent_data_set_is_named(offline: Path) -> None:
    with pytest.raises(ConfigError, match="is neither here nor in the cache"):
        huggingface.load(offline / "nothing")
