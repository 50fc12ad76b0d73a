"""What the paper's settings have in common: one function for each of its groups of experiments.

Source: Guan et al., "PipeOptim: Ensuring Effective 1F1B Schedule with Optimizer-Dependent Weight Prediction" (arXiv
2312.00839), and the public scripts, https://github.com/guanleics/PipeOptim at 06ad22b (January 2025).

What is as there: models, data, optimizers, learning rates, weight decay, batch sizes, epochs, four stages, an update for
every mini-batch, and the prediction by the paper's formula (``prediction="paper"``).

What is not, in every setting:

* The number of updates that is predicted is the paper's, D-1-k. The scripts use D-k, and more (they apply momentum once
  again to the last gradient, and fix eps at 1e-8).
* The stages are cut where their numbers of weights are most even; there, by hand.
* The pipeline does not drain at the end of an epoch, and an epoch's last, smaller batch is left out.
* Weights start as the zoo's models do (He et al. for convolutions).
"""

from __future__ import annotations

from pipeoptim.config import Component, TrainConfig

TINY_IMAGENET_IMAGES, CIFAR100_IMAGES, IMDB_REVIEWS = 100_000, 50_000, 25_000
VALIDATION_IMAGES = 10_000
STAGES = 4


def tiny_imagenet_sgd(name: str, model: str, batch_size: int, **options: object) -> TrainConfig:
    """Group 1: 70 epochs of SGD with momentum, divided by 10 at two points.

    The scripts enlarge random parts of the images to 224x224 (299x299 for Inception-V3) and the nets have 1000 outputs. Here
    images have their own 64x64 pixels, shifted by up to 8 of them and mirrored, the nets are the zoo's for that size, with 200
    outputs. The scripts lower the learning rate one epoch earlier, as they count epochs from 1.
    """
    return TrainConfig(
        recipe=name,
        model=Component(model, {"input_size": 64, "classes": 200, **options}),
        data=Component("pipeoptim_zoo.data.tiny_imagenet:tiny_imagenet", {"root": "data"}),
        optimizer=Component("sgd", {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}),
        lr_schedule=Component("milestones", {"at": [40, 60], "of": 70, "gamma": 0.1}),
        prediction="paper",
        stages=STAGES,
        batch_size=batch_size,
        steps=0,
        epochs=70,
        eval_every=TINY_IMAGENET_IMAGES // batch_size,
        eval_batches=VALIDATION_IMAGES // batch_size,
        checkpoint_every=TINY_IMAGENET_IMAGES // batch_size,
    )


def cifar100_adamw(name: str, model: str, **options: object) -> TrainConfig:
    """Group 2, images: 120 epochs of AdamW in batches of 128, the learning rate divided by 10 at epoch 90.

    Images are shifted by up to 4 pixels and mirrored, as in the scripts; they are normalised with CIFAR-100's own mean and
    deviation (there, with CIFAR-10's).
    """
    return TrainConfig(
        recipe=name,
        model=Component(model, {"input_size": 32, "classes": 100, **options}),
        data=Component("pipeoptim_zoo.data.cifar:cifar100", {"root": "data"}),
        optimizer=Component("adamw", {"lr": 1e-3, "weight_decay": 5e-4}),
        lr_schedule=Component("milestones", {"at": [90], "of": 120, "gamma": 0.1}),
        prediction="paper",
        stages=STAGES,
        batch_size=128,
        steps=0,
        epochs=120,
        eval_every=CIFAR100_IMAGES // 128,
        eval_batches=VALIDATION_IMAGES // 128,
        checkpoint_every=CIFAR100_IMAGES // 128,
    )


def imdb_lstm(name: str, optimizer: Component) -> TrainConfig:
    """Groups 2 and 3, text: a residual LSTM on IMDb.

    The paper names the model, the data and the optimizer; no code for it is public. All else is ours: 8 layers of 256 units on
    the first 256 words of a review, the 20,000 most frequent words, batches of 64, 10 epochs, a constant learning rate.
    """
    words, context = 20_000, 256
    return TrainConfig(
        recipe=name,
        model=Component(
            "pipeoptim_zoo.models.recurrent:residual_lstm",
            {"vocab_size": words, "classes": 2, "width": 256, "layers": 8, "dropout": 0.2},
        ),
        data=Component("pipeoptim_zoo.data.imdb:imdb", {"root": "data", "context": context, "vocab_size": words}),
        optimizer=optimizer,
        prediction="paper",
        stages=STAGES,
        batch_size=64,
        steps=0,
        epochs=10,
        eval_every=IMDB_REVIEWS // 64,
        eval_batches=IMDB_REVIEWS // 64,
        checkpoint_every=IMDB_REVIEWS // 64,
    )


def wmt16_adam(name: str, model: str) -> TrainConfig:
    """Group 3, translation from English to German: 8 epochs of Adam in batches of 64, sentences of at most 50 words.

    Label smoothing 0.1 and weight decay 1e-4 (added to the gradient) are what the scripts' program does by default. It sorts
    sentences of like length into batches and computes activations twice; neither is done here. The score there is BLEU of a
    beam search; a run here reports accuracy and bits per word of the reference (``pipeoptim_zoo.models.translate`` and
    ``pipeoptim_zoo.data.bleu`` score a trained model).
    """
    words, length = 32_320, 50
    return TrainConfig(
        recipe=name,
        model=Component(model, {"vocab_size": words, "source_length": length, "width": 1024, "dropout": 0.2}),
        data=Component(
            "pipeoptim_zoo.data.wmt:wmt16",
            {"root": "data/wmt16", "source_length": length, "target_length": length, "vocab_size": words},
        ),
        optimizer=Component("adam", {"lr": 3e-4, "weight_decay": 1e-4}),
        prediction="paper",
        stages=STAGES,
        batch_size=64,
        steps=0,
        epochs=8,
        eval_every=5000,
        eval_batches=40,
        checkpoint_every=5000,
    )
