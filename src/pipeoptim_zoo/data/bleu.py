"""Corpus BLEU, the score of the translation experiments: Papineni et al. (ACL 2002)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from pipeoptim.errors import ConfigError

__all__ = ["bleu"]

_ORDER = 4


def _grams(words: Sequence[str], order: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + order]) for i in range(len(words) - order + 1))


def bleu(hypotheses: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> float:
    """``100 * min(1, exp(1 - r/c)) * (p1 p2 p3 p4)**(1/4)``, with one reference for each hypothesis.

    p_n: share of the hypotheses' n-grams that their references have, clipped and summed over the corpus; c, r: words
    of all hypotheses and of all references. 0 where some p_n is 0. It scores the words it is given: figures compare
    with published ones only after the same tokenisation. Raises ConfigError if the two numbers of sentences differ.

    >>> bleu(["the cat sat on the mat".split()], ["the cat sat on the mat".split()])
    100.0
    """
    if len(hypotheses) != len(references):
        raise ConfigError(f"{len(hypotheses)} hypotheses and {len(references)} references; give one for each")
    logs = 0.0
    for order in range(1, _ORDER + 1):
        hits = total = 0
        for hypothesis, reference in zip(hypotheses, references, strict=True):
            grams = _grams(hypothesis, order)
            hits += (grams & _grams(reference, order)).total()
            total += grams.total()
        if not hits:
            return 0.0
        logs += math.log(hits / total) / _ORDER
    ours, theirs = sum(map(len, hypotheses)), sum(map(len, references))
    return 100.0 * math.exp(logs + min(0.0, 1.0 - theirs / ours))
