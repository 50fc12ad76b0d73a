"""Any text, tokenized and packed into blocks of one length: what causal language models are trained on.

Read, tokenized and kept by Hugging Face's ``datasets``, as memory-mapped files in its cache: once per text and tokenizer, whatever the
number of processes. An extra: ``pip install 'pipeoptim[causal-lm]'``.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeoptim.errors import ConfigError, first_line
from pipeoptim_zoo.data.huggingface import VALIDATION, load
from pipeoptim_zoo.data.losses import cross_entropy, token_accuracy
from pipeoptim_zoo.data.stdlib_text import MAX_FILE_BYTES, library_files
from pipeoptim_zoo.data.task import IndexedTask
from pipeoptim_zoo.hub import from_hub
from pipeoptim_zoo.models.causal_lm import installed

__all__ = ["packed_text"]

STDLIB, BYTES = "stdlib", "bytes"
_STDLIB_FILES = 60
_FORMS = {".txt": "text", ".jsonl": "json", ".parquet": "parquet"}
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def packed_text(
    text: str | Sequence[str],
    tokenizer: str = "",
    context: int = 256,
    column: str = "text",
    subset: str | None = None,
    validation: float = 0.05,
    seed: int = 0,
    model_options: Mapping[str, Any] | None = None,
) -> IndexedTask:
    """Next-token prediction: x and y are ``[B, context]`` int64, y one token later.

    Documents follow one another, each closed by the tokenizer's end of text, and are cut into blocks of ``context + 1`` tokens.

    Args:
        text: a file or a folder of files (``.txt``: a document each; ``.jsonl`` and ``.parquet``: one per row), several of them, the name
            of a data set on the hub, a folder that ``save_to_disk`` wrote, or ``"stdlib"``: the source of Python's standard library.
        tokenizer: a folder or a name on the hub, or ``"bytes"``. By default that of the model's ``source``, and bytes for a model that
            is only a configuration.
        column: of the text, where there are several.
        subset: of a data set on the hub, its configuration.
        validation: share of the blocks that is kept for it, the last ones; where the data has a split for it, that is taken instead.

    Raises:
        ConfigError: a package, file or column is missing, or there is not enough text.
    """
    if not (type(context) is int and context >= 1):
        raise ConfigError(f"context is {context!r}, must be a number of tokens of at least 1")
    if not 0 < validation < 1:
        raise ConfigError(f"validation is {validation!r}, must be a share between 0 and 1")
    if not sys.stderr.isatty():
        installed("datasets").disable_progress_bars()
    splits = _splits(text, subset)
    source = (model_options or {}).get("source")
    made = _tokenizer(tokenizer or (source if isinstance(source, str) else BYTES))
    packed = {name: _packed(split, made, context, column, text) for name, split in splits.items()}
    if len(packed) == 1:
        blocks = packed["train"]
        first = max(0, len(blocks) - max(1, round(len(blocks) * validation)))
        parts = [blocks.select(range(first)), blocks.select(range(first, len(blocks)))]
    else:
        parts = list(packed.values())
    if not all(len(part) for part in parts):
        raise ConfigError(
            f"text {text!r} has {sum(map(len, packed.values()))} blocks of context={context} + 1 tokens, which is not enough to "
            "train and to validate; lower context, or give more text"
        )
    return IndexedTask(
        name="packed_text",
        train=_Blocks(parts[0].with_format("numpy")),
        validation=_Blocks(parts[1].with_format("numpy")),
        loss=_loss,
        metrics=_metrics,
        origin=f"{text}, tokenizer {made.name_or_path or BYTES} ({len(made)} tokens), context {context}",
        seed=seed,
        vocab_size=len(made),
        context=context,
        also_save=(made if isinstance(source, str) and not tokenizer else _AnotherTokenizer(made, source),),
    )


@dataclass(frozen=True)
class _AnotherTokenizer:
    """A tokenizer that is not the one of the model's ``source``: an export's description names its special tokens, by which text is
    generated. A configuration's defaults are ids of the vocabulary that its kind was published with.

    What the configuration itself names, it keeps.
    """

    tokenizer: Any
    source: Any

    def save_pretrained(self, folder: str | Path) -> None:
        self.tokenizer.save_pretrained(folder)
        named = self.source if isinstance(self.source, Mapping) else {}
        ids = {f"{kind}_token_id": getattr(self.tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
        for path in (Path(folder) / "config.json", Path(folder) / "generation_config.json"):
            if path.exists():
                told = json.loads(path.read_text(encoding="utf-8")) | {name: i for name, i in ids.items() if name not in named}
                path.write_text(json.dumps(told, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class _Blocks:
    """Rows of ``context + 1`` tokens."""

    rows: Any

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        ids = torch.as_tensor(self.rows[indices.tolist()]["ids"]).long()
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def _splits(text: str | Sequence[str], subset: str | None) -> dict[str, Any]:
    """``train``, and ``validation`` where there is one."""
    if text == STDLIB:
        root = Path(os.__file__).parent
        files = [
            (root / path).read_bytes()[:MAX_FILE_BYTES].decode(errors="replace") for path in library_files()[:_STDLIB_FILES]
        ]
        return {"train": installed("datasets").Dataset.from_dict({"text": files})}
    given = [text] if isinstance(text, str) else list(text)
    paths = [Path(one).expanduser() for one in given]
    missing = [one for one, path in zip(given, paths, strict=True) if not path.exists() and (len(given) > 1 or _is_local(one))]
    if missing or not all(given):
        raise ConfigError(f"text {(*missing, '')[0]!r} is no file and no folder in {Path.cwd()}; check the name")
    found = [file for path in paths for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    files = [str(file) for file in found if file.suffix in _FORMS and file.is_file()]
    if files and not any((path / "dataset_dict.json").exists() for path in paths):
        return {"train": _read(files)}
    try:
        splits = {} if len(paths) != 1 or paths[0].is_file() else load(given[0], subset)
    except ConfigError:
        if not paths[0].is_dir():
            raise
        splits = {}
    if not splits:
        raise ConfigError(f"text {text!r} has no file that ends in one of {', '.join(_FORMS)}; give others, or rename them")
    held_out = next((name for name in VALIDATION if name in splits), None)
    if "train" not in splits:
        raise ConfigError(f"data set {text} has splits {sorted(splits)}; it needs one called train")
    return {"train": splits["train"]} | ({} if held_out is None else {"validation": splits[held_out]})


def _is_local(name: str) -> bool:
    """Whether what does not exist was meant as a path, and not as a name on the hub, which would be asked for a long time."""
    first, *others = Path(name).parts
    return (
        Path(name).suffix in _FORMS
        or name[0] in "./~"
        or (bool(others) and Path(first).is_dir())
        or not _HUB_NAME.fullmatch(name)
    )


def _read(files: list[str]) -> Any:
    """Files of one form or of several, as one data set with a column for the text."""
    datasets = installed("datasets")
    parts = []
    for form in dict.fromkeys(_FORMS[Path(file).suffix] for file in files):
        own = [file for file in files if _FORMS[Path(file).suffix] == form]
        options = {"sample_by": "document"} if form == "text" else {}
        try:
            parts.append(datasets.load_dataset(form, data_files=own, split="train", **options))
        except Exception as error:  # pyarrow's, pandas' and the file system's errors have no common base
            raise ConfigError(f"text {own[0]} cannot be read: {first_line(error)}; is it a {form} file?") from error
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)


def _tokenizer(name: str) -> Any:
    transformers = installed("transformers")
    transformers.logging.set_verbosity_error()
    if name == BYTES:
        return transformers.ByT5Tokenizer(extra_ids=0)
    try:
        with from_hub("tokenizer", name):
            found = transformers.AutoTokenizer.from_pretrained(name)
    except ConfigError:
        raise
    except Exception as error:  # the hub's, the network's and the file system's errors have no common base
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"tokenizer {name!r} cannot be read ({reason}); name a folder that has one, or give 'bytes'"
        ) from error
    if not found("a", add_special_tokens=False)["input_ids"]:  # what Transformers makes of a model's folder without one
        raise ConfigError(f"tokenizer {name!r} has no tokens; give another one as tokenizer, or 'bytes'")
    return found


def _packed(split: Any, tokenizer: Any, context: int, column: str, text: Any) -> Any:
    """Blocks of ``context + 1`` tokens, in column ``ids``."""
    if column not in split.column_names:
        raise ConfigError(f"text {text!r} has columns {split.column_names}, not {column!r}; name one of them as column")
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def pack(rows: Mapping[str, Sequence[str | None]]) -> dict[str, list[list[int]]]:
        documents = [document for document in rows[column] if document]
        found = tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"] if documents else []
        ids = list(chain.from_iterable(chain(one, end) for one in found))
        size = context + 1
        return {"ids": [ids[i : i + size] for i in range(0, len(ids) - size + 1, size)]}

    # Of what it is made, and not of the function's bytes, which differ from process to process: all of a run find what the first made.
    made_of = [split._fingerprint, column, context, type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    fingerprint = hashlib.sha256(repr(made_of).encode()).hexdigest()[:32]
    return split.map(pack, batched=True, remove_columns=split.column_names, new_fingerprint=fingerprint)


def _loss(output: Any, target: Tensor) -> Tensor:
    return cross_entropy(_logits(output), target)


def _metrics(output: Any, target: Tensor) -> dict[str, float]:
    return token_accuracy(_logits(output), target)


def _logits(output: Any) -> Tensor:
    """Of a model's own output object, or of one that returns them alone."""
    found: Tensor = getattr(output, "logits", output)
    return found
