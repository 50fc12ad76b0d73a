"""What processes tell each other about themselves arrives as it was, as plain data."""

import numpy as np
import pytest
import torch

import pipeoptim as po
from pipeoptim.engine.processes.collectives import pack, unpack


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        "text",
        {0: {"weight": ["0.weight"]}, 1: {}},
        ([{"stage": 1, "idle": None}], {"val_loss": float("inf"), "metrics": {"accuracy": 0.5}}),
        (),
    ],
)
def test_plain_data_arrives_as_it_was(value):
    assert unpack(pack(value)) == value


def test_tensors_arrive_with_their_values_types_and_shapes():
    tree = {"w": torch.randn(3, 5), "h": torch.ones(7, dtype=torch.bfloat16), "none": torch.empty(0, 2), "n": torch.tensor(3)}
    block = pack(tree)
    arrived = unpack(torch.cat([block, torch.full((100,), 255, dtype=torch.uint8)]))  # as in a longer message of another's size
    for name, tensor in tree.items():
        assert arrived[name].dtype == tensor.dtype and torch.equal(arrived[name], tensor)
        assert arrived[name].untyped_storage().nbytes() == tensor.untyped_storage().nbytes(), "else torch.save would write all"


def test_numbers_of_numpy_arrive_as_pythons_own():
    arrived = unpack(pack([np.float64(0.1), torch.__version__]))
    assert arrived == [0.1, str(torch.__version__)]
    assert [type(one) for one in arrived] == [float, str]


def test_an_object_is_refused():
    with pytest.raises(po.ConfigError, match="a object cannot be sent to the other processes"):
        pack({"a": object()})
