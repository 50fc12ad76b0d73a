"""Padding must not change what a recurrent model says, and attention must look where there are words."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from pipeoptim.errors import ConfigError
from pipeoptim_zoo.data.vocabulary import BEGIN, END
from pipeoptim_zoo.models.gnmt import AttentionLayer, BidirectionalLayer, gnmt, reversal
from pipeoptim_zoo.models.recurrent import residual_lstm
from pipeoptim_zoo.models.translate import greedy


def test_more_padding_does_not_change_a_sentiment() -> None:
    torch.manual_seed(0)
    model = residual_lstm(20, 3, 8, 3).eval()
    ids = torch.tensor([[4, 5, 6], [7, 8, 0]])
    longer = torch.cat([ids, torch.zeros(2, 4, dtype=torch.long)], dim=1)
    torch.testing.assert_close(model(ids), model(longer))


def test_an_empty_text_gives_numbers() -> None:
    assert residual_lstm(20, 3, 8, 2)(torch.zeros(2, 5, dtype=torch.long)).isfinite().all()


def test_reversal_is_its_own_inverse() -> None:
    mask = torch.tensor([[True] * 5, [True] * 2 + [False] * 3, [False] * 5])
    order = reversal(mask)
    assert order.tolist() == [[4, 3, 2, 1, 0], [1, 0, 2, 3, 4], [0, 1, 2, 3, 4]]
    assert torch.equal(order.gather(1, order), torch.arange(5).expand(3, 5))


def test_bidirectional_layer_equals_torchs_packed_lstm() -> None:
    torch.manual_seed(0)
    layer, x = BidirectionalLayer(6), torch.randn(3, 5, 6)
    lengths = torch.tensor([5, 3, 1])
    mask = torch.arange(5) < lengths[:, None]
    reference = nn.LSTM(6, 6, batch_first=True, bidirectional=True)
    for name, weight in layer.forwards.named_parameters():
        getattr(reference, name).data.copy_(weight)
    for name, weight in layer.backwards.named_parameters():
        getattr(reference, f"{name}_reverse").data.copy_(weight)
    packed = pack_padded_sequence(x, lengths, batch_first=True)
    expected, _ = pad_packed_sequence(reference(packed)[0], batch_first=True)
    torch.testing.assert_close(layer(x, mask)[0] * mask[..., None], expected)


def test_attention_gives_padding_no_weight() -> None:
    torch.manual_seed(0)
    layer = AttentionLayer(6, dropout=0.0)
    x, memory = torch.randn(2, 3, 6), torch.randn(2, 4, 6)
    mask = torch.tensor([[True, True, False, False], [True, True, True, True]])
    disturbed = memory.clone()
    disturbed[0, 2:] += 100
    torch.testing.assert_close(layer(x, memory, mask)[1], layer(x, disturbed, mask)[1])
    assert layer(x, memory, torch.zeros_like(mask))[1].isfinite().all()


def test_more_source_padding_does_not_change_a_translation() -> None:
    torch.manual_seed(0)
    short, long = gnmt(20, 4, 8, 8).eval(), gnmt(20, 7, 8, 8).eval()
    long.load_state_dict(short.state_dict())
    source = torch.tensor([[4, 5, 6, 0], [7, 8, 9, 10]])
    target = torch.tensor([[BEGIN, 5, 6], [BEGIN, 7, 0]])
    padded = torch.cat([source, torch.zeros(2, 3, dtype=torch.long)], dim=1)
    torch.testing.assert_close(short(torch.cat([source, target], 1)), long(torch.cat([padded, target], 1)))


def test_gnmt_does_not_see_later_target_words_but_sees_all_of_the_source() -> None:
    torch.manual_seed(0)
    model = gnmt(20, 4, 8, 8).eval()
    ids = torch.tensor([[4, 5, 6, 7, BEGIN, 8, 9, 10]])
    later, other = ids.clone(), ids.clone()
    later[0, 7], other[0, 3] = 11, 12
    before = model(ids)
    torch.testing.assert_close(before[:, :3], model(later)[:, :3])
    assert not torch.allclose(before[:, 0], model(other)[:, 0])


@pytest.mark.parametrize("layers", [2, 5])
def test_gnmt_needs_two_halves(layers: int) -> None:
    with pytest.raises(ConfigError, match=f"layers={layers}"):
        gnmt(20, 4, 8, layers)


class _Script(nn.Module):
    """Says word ``place + 4`` at each place, and END at the third place of the first sentence."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        places = ids.shape[1] - 3
        logits = torch.zeros(len(ids), places, 20)
        for place in range(places):
            logits[:, place, place + 4] = 1
            logits[0, place, END] = 2.0 if place == 2 else 0.0
        return logits


def test_greedy_translation_stops_at_the_end_of_each_sentence() -> None:
    out = greedy(_Script(), torch.ones(2, 3, dtype=torch.long), target_length=5)
    assert out.tolist() == [[4, 5, END, 0, 0], [4, 5, 6, 7, 8]]
