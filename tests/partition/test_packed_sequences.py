"""Recurrent models on packed sequences: cut between layers that pack by themselves, and told what to do where the model packs."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import pipeoptim as po


def packed(rnn, x, lengths):
    sequence = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    return pad_packed_sequence(rnn(sequence)[0], batch_first=True, total_length=x.shape[1])[0]


class Layer(nn.LSTM):
    def forward(self, x, lengths=None):
        return super().forward(x) if lengths is None else x + packed(super().forward, x, lengths)


class Tagger(nn.Module):
    def __init__(self, inside):
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.layers = nn.ModuleList(Layer(8, 4, bidirectional=True, batch_first=True) for _ in range(3))
        self.head = nn.Linear(8, 3)
        self.inside = inside

    def forward(self, words, lengths):
        x = self.embed(words)
        for layer in self.layers:
            x = layer(x, lengths) if self.inside else x + packed(layer, x, lengths)
        return self.head(x)


BATCH = (torch.randint(9, (4, 6)), torch.tensor([6, 2, 5, 3]))


def test_layers_that_pack_by_themselves_are_cut_and_compute_the_same():
    model = Tagger(inside=True)
    cut = po.partition(model, 2, BATCH)
    assert cut.how == "layers"
    first, second = cut.stages
    other = (torch.randint(9, (4, 6)), torch.tensor([1, 6, 4, 4]))
    for words, lengths in (BATCH, other):
        passed = first(words, lengths)
        torch.testing.assert_close(second(*(passed if isinstance(passed, tuple) else (passed,))), model(words, lengths))


@pytest.mark.filterwarnings("ignore:The tensor attributes")
def test_a_model_that_packs_around_its_layers_is_told_what_to_do():
    told = "Tagger cannot be cut into 2 stages between its layers, since .* by a trace either: .*; put what is done around .*nowhere-to-cut"
    with pytest.raises(po.ConfigError, match=told) as found:
        po.partition(Tagger(inside=False), 2, BATCH)
    assert found.value.__suppress_context__, "torch's own traceback has a hundred lines"
