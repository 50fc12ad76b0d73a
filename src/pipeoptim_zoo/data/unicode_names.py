"""Translation without a download: what Unicode says of a character, into the character's name.

"00E9 Ll 0065 0301", the code point, category and decomposition of a letter, becomes "LATIN SMALL LETTER E
WITH ACUTE". The names are those of Unicode 3.2, which every Python carries beside its newer database: the
data set is the same everywhere.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from unicodedata import ucd_3_2_0 as unicode

from pipeoptim_zoo.data.losses import label_smoothing, token_accuracy
from pipeoptim_zoo.data.sequences import OneLineSource, PairSource
from pipeoptim_zoo.data.task import IndexedTask, shuffled
from pipeoptim_zoo.data.vocabulary import Vocabulary

__all__ = ["SOURCE_LENGTH", "TARGET_LENGTH", "characters", "unicode_names"]

SOURCE_LENGTH, TARGET_LENGTH = 24, 48
_SPLIT_SEED = 32  # of the split, not of the run: runs with different seeds share their validation set


@lru_cache(maxsize=1)
def characters() -> tuple[tuple[str, str], ...]:
    """(description, name) of each character whose name is not computed from its number.

    Left out: Hangul syllables, names that contain the code point, and descriptions or names that do not fit.

    >>> next(pair for pair in characters() if pair[0].startswith("E9 "))
    ('E9 Ll 0065 0301', 'LATIN SMALL LETTER E WITH ACUTE')
    """
    pairs = []
    for code in range(sys.maxunicode + 1):
        character = chr(code)
        name = unicode.name(character, "")
        if not name or f"{code:04X}" in name or name.startswith("HANGUL SYLLABLE"):
            continue
        description = f"{code:X} {unicode.category(character)} {unicode.decomposition(character)}".strip()
        if len(description) <= SOURCE_LENGTH and len(name) < TARGET_LENGTH:
            pairs.append((description, name))
    return tuple(pairs)


def unicode_names(seed: int = 0, one_line: bool = False) -> IndexedTask:
    """From a character's description to its name, letter by letter; x and y as ``PairSource`` packs them.

    x ``[B, 24 + 48]`` int64, y ``[B, 48]``; ``task.vocab_size`` ids. One pair in ten is for validation.
    ``seed`` orders the training examples; the split is fixed. ``one_line``: for models of one sequence, such as ``gpt``;
    y is ``[B, 24 + 48]``, and its first 24 places are ignored.

    >>> task = unicode_names()
    >>> x, y = task.train_batch(step=0, batch_size=3)
    >>> tuple(x.shape), tuple(y.shape)
    ((3, 72), (3, 48))
    """
    pairs = characters()
    vocabulary = Vocabulary.build((text for pair in pairs for text in pair), size=1000)
    order = shuffled(len(pairs), _SPLIT_SEED, 0).tolist()

    def source(numbers: list[int]) -> PairSource:
        descriptions, names = ([vocabulary.encode(pairs[i][side]) for i in numbers] for side in (0, 1))
        return (OneLineSource if one_line else PairSource)(descriptions, names, SOURCE_LENGTH, TARGET_LENGTH)

    return IndexedTask(
        name="unicode_names",
        train=source(order[len(order) // 10 :]),
        validation=source(order[: len(order) // 10]),
        loss=label_smoothing,
        metrics=token_accuracy,
        origin=f"the character names of Unicode {unicode.unidata_version} in Python's unicodedata",
        seed=seed,
        vocab_size=len(vocabulary),
    )
