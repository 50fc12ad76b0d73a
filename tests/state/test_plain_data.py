"""State as JSON and tensors: every tensor has a name of its own, and what earlier versions wrote is read."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pipeoptim as po
from pipeoptim.checkpoint.plain_data import flatten, rebuild, same_plain

KEYS = st.one_of(
    st.sampled_from(["a", "b", "a/b", "b/a", "~", "~1", "1", "@0", "0key", "$x", ""]), st.integers(-1, 2), st.booleans()
)
TENSORS = st.integers(0, 10**6).map(lambda n: torch.tensor([n]))
STATES = st.recursive(
    TENSORS, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=4)), max_leaves=12
)


@given(STATES)
def test_any_state_comes_back(state):
    tensors = {}
    assert same_plain(rebuild(flatten(state, "x", tensors), tensors), state)


@pytest.mark.parametrize(
    "state",
    [
        {"a/b": torch.zeros(1), "a": {"b": torch.ones(1)}},
        {1: torch.zeros(1), "1": torch.ones(1)},
        {"~1": torch.zeros(1), "/": torch.ones(1)},
        {1: torch.zeros(1), True + 1: torch.ones(1), "@0": torch.zeros(1)},
    ],
)
def test_paths_that_print_alike_do_not_collide(state):
    tensors = {}
    assert same_plain(rebuild(flatten(state, "x", tensors), tensors), state)
    assert len(tensors) == len(state)


def test_a_name_that_is_taken_is_refused():
    tensors = {"x": torch.zeros(1)}
    with pytest.raises(po.ConfigError, match="two tensors of this state are called 'x'"):
        flatten(torch.ones(1), "x", tensors)


def test_names_of_earlier_versions_are_read():
    tensors = {"x/a/b": torch.ones(1), "x/1": torch.zeros(1)}
    old = {"$items": [["a/b", {"$tensor": "x/a/b"}], [1, {"$tensor": "x/1"}]]}
    assert same_plain(rebuild(old, tensors), {"a/b": torch.ones(1), 1: torch.zeros(1)})
