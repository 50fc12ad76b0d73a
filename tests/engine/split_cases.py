"""The same numbers in every kind of container that a pipeline splits, each with the function that reads it back."""

from collections import namedtuple

import torch
from torch import nn

WIDTH = 3
Pair = namedtuple("Pair", "left right")


def read(value):
    """The (rows, WIDTH) tensor that a container of the table below was made from, whatever part of it is left."""
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, dict):
        return torch.cat([read(value["left"]), read(value["right"])], 1)
    if isinstance(value, Pair) or (isinstance(value, tuple) and isinstance(value[0], (torch.Tensor, list))):
        return torch.cat([read(value[0]), read(value[1])], 1)
    return torch.stack([read_row(row) for row in value])


def read_row(row):
    if isinstance(row, dict):
        return row["box"][0]
    if isinstance(row, str):
        return torch.tensor([float.fromhex(number) for number in row.split()], dtype=torch.float64)
    if isinstance(row, (list, tuple)):
        return torch.tensor(row, dtype=torch.float64)
    return row if isinstance(row, torch.Tensor) else torch.as_tensor(row)


def boxes(x):
    """As a detector's targets: one dict per row, as many boxes in each as there are rows, so that every axis looks like the batch."""
    return [{"box": row.expand(len(x), WIDTH)} for row in x]


def texts(x):
    return [" ".join(float(number).hex() for number in row) for row in x]


def ragged(x):
    return [{"box": row.expand(1 + n, WIDTH)} for n, row in enumerate(x)]


# How rows of numbers may be given, so that ``read`` gives them back.
CONTAINERS = {
    "tensor": lambda x: x,
    "array": lambda x: x.numpy(),
    "read-only array, backwards": lambda x: frozen(x.flip(0).numpy()[::-1]),
    "list of tensors": lambda x: list(x),
    "list of arrays": lambda x: list(x.numpy()),
    "list of lists": lambda x: x.tolist(),
    "list of dicts": boxes,
    "list of ragged dicts": ragged,
    "tuple of dicts": lambda x: tuple(boxes(x)),
    "list of texts": texts,
    "tuple of texts": lambda x: tuple(texts(x)),
    "dict": lambda x: {"left": x[:, :1], "right": x[:, 1:]},
    "dict of a list and an array": lambda x: {"left": list(x[:, :1]), "right": x[:, 1:].numpy()},
    "tuple": lambda x: (x[:, :1], x[:, 1:]),
    "named tuple": lambda x: Pair(x[:, :1], list(x[:, 1:])),
}


def frozen(array):
    array.flags.writeable = False
    return array


class Reader(nn.Module):
    """The first stage: reads any container and a second one that comes as a keyword."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)

    def forward(self, x, *, gate=None):
        hidden = torch.tanh(self.linear(read(x)))
        return hidden if gate is None else hidden * read(gate)


class Gate(nn.Module):
    """A later stage with a keyword of its own."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)

    def forward(self, x, *, gate=None):
        x = self.linear(x)
        return x if gate is None else x * read(gate)


def loss_fn(output, target):
    return nn.functional.mse_loss(output, read(target))


def stages(depth=2):
    torch.manual_seed(0)
    return [Reader(), *(Gate() for _ in range(depth - 1))]


def sgd(params):
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def numbers(rows, seed):
    return torch.randn(rows, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def batches():
    """Every container as input, keyword and target at once; batches of 5 and 6 rows."""
    names = list(CONTAINERS)
    for n, name in enumerate(names):
        rows = 5 + n % 2
        give = [CONTAINERS[other] for other in (name, names[n - 1], names[n - 2])]
        yield [make(numbers(rows, 3 * n + i)) for i, make in enumerate(give)]
