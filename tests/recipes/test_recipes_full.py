"""The full recipes: what they train is what was published, and they say what to download. No data set is needed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from pipeoptim.cli.app import _run
from pipeoptim.config import TrainConfig
from pipeoptim.errors import ConfigError
from pipeoptim.train.checks import check
from pipeoptim.train.cut import cut
from pipeoptim.train.lr_schedules import factory
from pipeoptim.train.optimizers import factory as optimizer_factory
from pipeoptim.train.recipes import full_name, get_recipe, recipes
from pipeoptim.train.targets import build

NAMES = sorted(recipes())


def lstm(inputs: int, width: int) -> int:
    """Parameters of one LSTM layer: four gates, two biases each, as torch has them."""
    return 4 * width * (inputs + width) + 8 * width


def gnmt(layers: int, words: int = 32_320, w: int = 1024) -> int:
    """From the paper's figure: embeddings, encoder, attention, decoder with the context in every later layer, projection."""
    half = layers // 2
    encoder = 2 * lstm(w, w) + lstm(2 * w, w) + (half - 2) * lstm(w, w)
    attention = lstm(w, w) + 2 * w * w + 2 * w + 1
    return 2 * words * w + encoder + attention + (half - 1) * lstm(2 * w, w) + (w + 1) * words


#: Published counts at 1000 classes, and what is another at this input size and number of classes.
PARAMETERS = {
    # the classifier sees 3x3 instead of 6x6 positions
    "alexnet_tinyimagenet": 61_100_840 - (9216 - 2304) * 4096 - 800 * 4097,
    # first convolution 3x3 instead of 7x7
    "resnet101_tinyimagenet": 44_549_160 - 800 * 2049 - 3 * 64 * (49 - 9),
    "inception_v3_tinyimagenet": 23_834_568 - 800 * 2049,
    # one linear layer of 512 inputs in place of three
    "vgg16_cifar100": 138_365_992 - (25_089 * 4096 + 4097 * 4096 + 4097 * 1000) + 513 * 100,
    "googlenet_cifar100": 6_624_904 - 900 * 1025 - 3 * 64 * (49 - 9),
    "lstm_imdb_adam": 20_000 * 256 + 8 * lstm(256, 256) + 257 * 2,
    "lstm_imdb_adamw": 20_000 * 256 + 8 * lstm(256, 256) + 257 * 2,
    "gnmt8_wmt16": gnmt(8),
    "gnmt16_wmt16": gnmt(16),
}

#: optimizer, options, batch size, epochs: Table III of the paper and the public scripts.
SETTINGS = {
    "alexnet_tinyimagenet": ("sgd", {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}, 128, 70),
    "resnet101_tinyimagenet": ("sgd", {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}, 64, 70),
    "inception_v3_tinyimagenet": ("sgd", {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}, 64, 70),
    "vgg16_cifar100": ("adamw", {"lr": 1e-3, "weight_decay": 5e-4}, 128, 120),
    "googlenet_cifar100": ("adamw", {"lr": 1e-3, "weight_decay": 5e-4}, 128, 120),
    "gnmt8_wmt16": ("adam", {"lr": 3e-4, "weight_decay": 1e-4}, 64, 8),
    "gnmt16_wmt16": ("adam", {"lr": 3e-4, "weight_decay": 1e-4}, 64, 8),
}

#: Learning rate in some epochs (counted from 0).
RATES = {
    "alexnet_tinyimagenet": {0: 0.01, 39: 0.01, 40: 0.001, 59: 0.001, 60: 0.0001, 69: 0.0001},
    "vgg16_cifar100": {0: 1e-3, 89: 1e-3, 90: 1e-4, 119: 1e-4},
    "googlenet_cifar100": {89: 1e-3, 90: 1e-4},
    "gnmt8_wmt16": {0: 3e-4, 7: 3e-4},
}

#: What the line about missing data must say: what it is, where from, and the path that must exist.
DATA = {
    "tinyimagenet": ("Tiny-ImageNet", "CS231n", "data/tiny-imagenet-200/wnids.txt"),
    "cifar100": ("CIFAR-100", "University of Toronto", "data/cifar-100-binary/train.bin"),
    "imdb": ("IMDb", "Stanford", "data/aclImdb/train"),
    "wmt16": ("WMT-16 En-De", "translation task", "data/wmt16/train.en"),
}


def count(config: TrainConfig) -> int:
    with torch.device("meta"):
        model = build("model", config.model)
    assert len(cut(model, config.stages)) == config.stages
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_it_is_complete(name: str) -> None:
    config = get_recipe(name)
    assert config.recipe == name
    assert TrainConfig.from_json(config.to_json()) == config
    check(config)
    with torch.device("meta"):
        optimizer = optimizer_factory(config.optimizer)([torch.nn.Parameter(torch.ones(1))])
    factory(config.lr_schedule, config.steps or 10_000)(optimizer)


@pytest.mark.parametrize("name", NAMES)
def test_its_first_line_tells_the_size(name: str) -> None:
    line = (recipes()[name].__doc__ or "").strip().splitlines()[0]
    config = get_recipe(name)
    assert f"{config.stages} stages" in line
    told = re.search(r"([\d.]+) million weights", line)
    if told:
        assert round(count(config) / 1e6, len(told[1].partition(".")[2])) == float(told[1])


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_model_has_the_published_size(name: str) -> None:
    assert count(get_recipe(name)) == PARAMETERS[name]


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_the_paper(name: str) -> None:
    config = get_recipe(name)
    optimizer, options, batch_size, epochs = SETTINGS[name]
    assert (config.optimizer.target, config.optimizer.options) == (optimizer, options)
    assert (config.batch_size, config.microbatches, config.epochs, config.steps) == (batch_size, 1, epochs, 0)
    assert (config.method, config.prediction, config.stages) == ("pipeoptim", "paper", 4)


@pytest.mark.parametrize("name", RATES)
def test_learning_rate_by_epoch(name: str) -> None:
    config, per_epoch = get_recipe(name), 7
    optimizer = optimizer_factory(config.optimizer)([torch.nn.Parameter(torch.ones(1))])
    scheduler = factory(config.lr_schedule, config.epochs * per_epoch)(optimizer)
    rates = []
    for _ in range(config.epochs * per_epoch):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    for epoch, expected in RATES[name].items():
        assert rates[epoch * per_epoch : (epoch + 1) * per_epoch] == pytest.approx([expected] * per_epoch)


@pytest.mark.parametrize("name", [name for name in NAMES if name.rpartition("_")[2] in DATA or "imdb" in name])
@pytest.mark.parametrize("engine", ["emulator", "processes"])
def test_missing_data_is_one_line_and_nothing_written(
    name: str, engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert _run(["train", "--recipe", name.replace("_", "-"), "--engine", engine]) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1
    assert captured.out == ""
    for part in (*next(words for key, words in DATA.items() if key in name), "download"):
        assert part in lines[0]
    assert list(tmp_path.iterdir()) == []


def test_dashes_and_underscores_are_the_same() -> None:
    assert get_recipe("vgg16-cifar100") == get_recipe("vgg16_cifar100")
    assert full_name("gnmt8-wmt16", tiny=True) == get_recipe("gnmt8-wmt16", tiny=True).recipe == "gnmt8_wmt16-tiny"
    with pytest.raises(ConfigError, match="'vgg-cifar100'; did you mean 'vgg16_cifar100'"):
        get_recipe("vgg-cifar100")
