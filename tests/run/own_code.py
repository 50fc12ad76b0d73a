"""What a user has beside a run: a model that is no nn.Sequential, with tied weights, data, an optimizer and a recipe."""

import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


def net():
    return Net()


class Task:
    def __init__(self, seed=0):
        self.seed = seed

    def train_batch(self, step, batch_size):
        ids = torch.randint(11, (batch_size, 5), generator=torch.Generator().manual_seed(step + 1000 * self.seed))
        return ids, ids

    def validation_batches(self, batch_size):
        yield self.train_batch(10**6, batch_size)

    def loss(self, output, target):
        return nn.functional.cross_entropy(output.flatten(0, 1), target.flatten())

    def metrics(self, output, target):
        return {}

    def describe(self):
        return "digits to repeat"


def task(seed=0):
    return Task(seed)


class Opt(torch.optim.AdamW):
    pass


def recipe():
    from pipeoptim.config import Component, TrainConfig

    return TrainConfig(
        "own", Component("mine:net"), Component("mine:task"), Component("mine:Opt", {"lr": 0.01}), steps=4, stages=2
    )
