"""Batches are a function of (seed, step); losses and metrics are what their formulas say."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeoptim.errors import ConfigError
from pipeoptim_zoo.data import (
    IGNORE,
    IndexedTask,
    Task,
    TensorSource,
    accuracy,
    auxiliary_cross_entropy,
    cross_entropy,
    label_smoothing,
    token_accuracy,
)
from pipeoptim_zoo.data.bleu import bleu
from pipeoptim_zoo.data.dataset import dataset_task
from pipeoptim_zoo.data.digits import digits
from pipeoptim_zoo.data.images import random_crop_and_flip
from pipeoptim_zoo.data.loader import batches_from
from pipeoptim_zoo.data.stdlib_packages import packages
from pipeoptim_zoo.data.stdlib_text import chars
from pipeoptim_zoo.data.task import generator, shuffled
from pipeoptim_zoo.data.unicode_names import unicode_names
from pipeoptim_zoo.data.vocabulary import BEGIN, END, Vocabulary

BUNDLED: dict[str, Callable[[int], IndexedTask]] = {
    "digits": digits,
    "chars": lambda seed: chars(32, seed, max_bytes=200_000),
    "packages": lambda seed: packages(64, seed, max_bytes=20_000),
    "unicode_names": unicode_names,
}


def numbers(size: int, seed: int = 0) -> IndexedTask:
    """A task whose examples are 0, 1, ..., size - 1."""
    x = torch.arange(size)
    return IndexedTask("numbers", TensorSource(x, x), TensorSource(x, x), cross_entropy, accuracy, "arange", seed)


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 60), batch=st.integers(1, 60), seed=st.integers(-(2**63), 2**64), epoch=st.integers(0, 5))
def test_an_epoch_visits_no_example_twice(size: int, batch: int, seed: int, epoch: int) -> None:
    task = numbers(size, seed)
    if batch > size:
        with pytest.raises(ConfigError, match=f"batch_size={batch}"):
            task.train_batch(0, batch)
        return
    steps = task.steps_per_epoch(batch)
    seen = torch.cat([task.train_batch(epoch * steps + i, batch)[0] for i in range(steps)])
    assert len(seen) == steps * batch > size - batch
    assert len(seen.unique()) == len(seen)


@pytest.mark.parametrize("seed", [float("nan"), 1.0, "1", None])
def test_a_seed_that_is_no_integer_is_refused(seed: object) -> None:
    for draw in (lambda: numbers(9, seed).train_batch(0, 3), lambda: chars(32, seed, max_bytes=50_000).train_batch(0, 3)):  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="seed is .*, must be an integer"):
            draw()


def test_epochs_and_seeds_differ_in_order() -> None:
    orders = [tuple(shuffled(50, seed, epoch).tolist()) for seed in range(5) for epoch in range(5)]
    assert len(set(orders)) == 25


def test_neighbouring_generators_are_not_correlated() -> None:
    draws = torch.stack([torch.randn(200, generator=generator(0, step)) for step in range(100)])
    correlation = torch.corrcoef(draws) - torch.eye(100)
    assert float(correlation.abs().max()) < 0.35  # 4950 pairs of 200 numbers: the largest is about 4 / sqrt(200)


@pytest.mark.parametrize("name", BUNDLED)
def test_batches_depend_on_seed_and_step_alone(name: str) -> None:
    make = BUNDLED[name]
    task, other, reseeded = make(0), make(0), make(1)
    assert isinstance(task, Task)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = [task.train_batch(step, 8) for step in range(3)]
    far = task.train_batch(10 * task.steps_per_epoch(8) + 1, 8)
    assert torch.equal(torch.get_rng_state(), state), "the global random state was used"
    torch.manual_seed(2)
    again = other.train_batch(10 * other.steps_per_epoch(8) + 1, 8)  # a resumed run starts in the middle
    assert all(torch.equal(a, b) for a, b in zip(far, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first[2], other.train_batch(2, 8), strict=True))
    assert not torch.equal(first[0][0], first[1][0])
    assert not torch.equal(first[0][0], reseeded.train_batch(0, 8)[0])


@pytest.mark.parametrize("name", BUNDLED)
def test_validation_is_fixed_complete_and_apart_from_training(name: str) -> None:
    task, reseeded = BUNDLED[name](0), BUNDLED[name](1)
    ours = list(task.validation_batches(100))
    assert sum(len(x) for x, _ in ours) == len(task.validation)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(ours, reseeded.validation_batches(100), strict=True))
    train = {tuple(task.train.batch(torch.tensor([i]), None)[0].flatten().tolist()) for i in range(len(task.train))}
    held_out = [tuple(x.flatten().tolist()) for batch, _ in ours for x in batch]
    assert sum(x in train for x in held_out) < 0.01 * len(held_out)  # equal files' licence texts may meet


@pytest.mark.parametrize("name", BUNDLED)
def test_batches_fit_a_model(name: str) -> None:
    task = BUNDLED[name](0)
    x, y = task.train_batch(0, 4)
    if x.is_floating_point():
        assert 0 <= float(x.min()) < float(x.max()) <= 1
    else:
        assert x.dtype == torch.int64
        assert 0 <= int(x.min()) <= int(x.max()) < task.vocab_size
    assert y.dtype == torch.int64
    assert int(y.max()) < (task.classes or task.vocab_size)
    assert task.name in task.describe()
    assert str(len(task.train)) in task.describe()
    assert pickle.loads(pickle.dumps(task.loss)) is task.loss


def test_bad_steps_and_batch_sizes_are_refused() -> None:
    task = numbers(5)
    with pytest.raises(ConfigError, match="step=-1"):
        task.train_batch(-1, 2)
    with pytest.raises(ConfigError, match="batch_size=0"):
        task.train_batch(0, 0)
    with pytest.raises(ConfigError, match="batch_size=0"):
        next(task.validation_batches(0))


def test_digits_are_scikit_learns() -> None:
    task = digits()
    labels = torch.cat([y for _, y in task.validation_batches(1000)])
    assert (len(task.train), len(task.validation)) == (1437, 360)
    assert set(labels.tolist()) == set(range(10))


# Losses and metrics


def logits_and_targets() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, 3, 5), torch.tensor([[0, 4, IGNORE], [1, IGNORE, IGNORE]])


def test_cross_entropy_is_the_mean_over_counted_targets() -> None:
    logits, target = logits_and_targets()
    logs = logits.log_softmax(-1)
    expected = -(logs[0, 0, 0] + logs[0, 1, 4] + logs[1, 0, 1]) / 3
    torch.testing.assert_close(cross_entropy(logits, target), expected)


def test_label_smoothing_mixes_in_the_uniform_distribution() -> None:
    logits, target = logits_and_targets()
    logs = logits.log_softmax(-1)
    counted = [(0, 0, 0), (0, 1, 4), (1, 0, 1)]
    expected = -sum(0.9 * logs[i] + 0.1 * logs[i[:2]].mean() for i in counted) / 3
    torch.testing.assert_close(label_smoothing(logits, target), expected)


def test_a_micro_batch_of_padding_has_zero_loss_and_gradient() -> None:
    logits = torch.randn(2, 3, 5, requires_grad=True)
    loss = label_smoothing(logits, torch.full((2, 3), IGNORE))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_auxiliary_logits_weigh_three_tenths() -> None:
    logits, target = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    aux = torch.randn(4, 5)
    expected = cross_entropy(logits, target) + 0.3 * cross_entropy(aux, target)
    torch.testing.assert_close(auxiliary_cross_entropy((logits, aux), target), expected)
    torch.testing.assert_close(auxiliary_cross_entropy(logits, target), cross_entropy(logits, target))
    assert accuracy((logits, aux), target) == accuracy(logits, target)


def test_token_accuracy_counts_targets_only() -> None:
    logits, target = logits_and_targets()
    logits[0, 0, 0] = logits[0, 1, 4] = 50.0
    logits[1, 0, 1] = -50.0
    figures = token_accuracy(logits, target)
    nats = float(cross_entropy(logits, target))
    assert figures["accuracy"] == pytest.approx(2 / 3)
    assert figures["bits"] == pytest.approx(nats / math.log(2))


def test_bleu_of_a_worked_example() -> None:
    hypothesis = ["the", "cat", "the", "cat", "on", "the", "mat"]
    reference = ["the", "cat", "is", "on", "the", "mat"]
    # 1-grams: the 2, cat 1, on 1, mat 1 of 7; 2-grams: the cat, on the, the mat of 6; 3-grams: on the mat of 5; 4-grams: none
    assert bleu([hypothesis], [reference]) == 0.0
    long = [*reference, "today"]
    # 6/6, 5/5, 4/4, 3/3 and brevity exp(1 - 7/6)
    assert bleu([reference], [long]) == pytest.approx(100 * math.exp(1 - 7 / 6))
    both = bleu([hypothesis, reference], [reference, reference])
    assert both == pytest.approx(100 * (11 / 13 * 8 / 11 * 5 / 9 * 3 / 7) ** 0.25)
    with pytest.raises(ConfigError, match="1 hypotheses and 2"):
        bleu([[]], [[], []])


# Images and words


def test_crop_and_flip_moves_pixels_only() -> None:
    images = torch.arange(1, 2 * 3 * 6 * 6 + 1).view(2, 3, 6, 6)
    moved = random_crop_and_flip(images, 2, generator(0))
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    for ours, original in zip(moved, padded, strict=True):
        views = [
            view
            for flipped in (False, True)
            for top in range(5)
            for left in range(5)
            for view in [
                original[:, top : top + 6, left : left + 6].flip(-1) if flipped else original[:, top : top + 6, left : left + 6]
            ]
        ]
        assert sum(torch.equal(ours, view) for view in views) == 1


def test_vocabulary_ranks_by_frequency_then_alphabet() -> None:
    words = Vocabulary.build([["c", "b", "a", "b", "<s>"], ["d"]], size=7)
    assert words.words == ("<pad>", "<unk>", "<s>", "</s>", "b", "a", "c")
    assert words.encode(["b", "d", "c"]) == [4, 1, 6]
    assert words.decode([BEGIN, 4, 6, END, 5]) == ["b", "c"]


class Noisy(torch.utils.data.Dataset):
    """Examples with random augmentation."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, n: int) -> tuple[Tensor, int]:
        return torch.tensor([float(n)]) + torch.rand(1) / 2, n


def test_a_dataset_of_torch_is_a_task_that_any_process_can_begin_anywhere() -> None:
    task, other = (dataset_task(Noisy(), Noisy(), seed=3) for _ in range(2))
    batches = [task.train_batch(step, 3) for step in range(6)]
    for step in (4, 1):
        torch.rand(step)
        assert all(torch.equal(a, b) for a, b in zip(other.train_batch(step, 3), batches[step], strict=True))
    first, second = (torch.cat([y for _, y in batches[n : n + 3]]).tolist() for n in (0, 3))
    assert len(set(first)) == len(set(second)) == 9 and first != second
    assert all(torch.equal(x[:, 0].long(), y) for x, y in batches) and not torch.equal(batches[0][0], batches[0][1][:, None])
    with pytest.raises(ConfigError, match="map-style"):
        dataset_task(iter([1]), Noisy())


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_begins_anywhere_and_replicas_share_each_epoch(workers: int) -> None:
    def drawn(count: int, **options: int) -> list[list[int]]:
        batches = batches_from(torch.arange(25), 3, replicas=2, num_workers=workers, seed=1, **options)  # type: ignore[arg-type]
        return [next(batches).tolist() for _ in range(count)]

    mine, others = drawn(9), drawn(9, replica=1)  # 4 mini-batches of an epoch for each; one example is left over
    for first in (0, 4):
        epoch = [n for part in (mine, others) for batch in part[first : first + 4] for n in batch]
        assert len(epoch) == len(set(epoch)) == 24
    assert mine[:4] != mine[4:8], "each epoch has an order of its own"
    for start in (1, 4, 6) if workers == 0 else (6,):
        assert drawn(9 - start, start=start) == mine[start:]


def test_a_loader_without_a_mini_batch_is_refused() -> None:
    for batch_size, start, told in ((8, 0, "an epoch has 7 examples"), (0, 0, "set it to at least 1"), (2, -1, "start is -1")):
        with pytest.raises(ConfigError, match=told):
            batches_from(torch.arange(7), batch_size, start)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="data is a list_iterator .* map-style"):
        batches_from(iter([1]), 1)  # type: ignore[arg-type]
