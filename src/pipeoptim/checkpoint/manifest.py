"""What makes a folder a checkpoint: ``meta.json``, and files whose lengths and checksums are those that it lists."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeoptim.checkpoint.stage_files import stage_file

META = "meta.json"
FORMAT = 2


class TornError(Exception):
    """This folder is not a complete checkpoint; the message says why."""


class OtherFormatError(TornError):
    """This folder was written by another version. It may be complete, so it is neither read nor passed over.

    Attributes:
        age: of that version, ``"a later"`` or ``"an earlier"``.
    """

    def __init__(self, found: int) -> None:
        super().__init__(f"{META} has format {found}, this version reads {FORMAT}")
        self.age = "a later" if found > FORMAT else "an earlier"


@dataclass(frozen=True)
class Meta:
    """Contents of ``meta.json``.

    Args:
        step: mini-batches done.
        config: fingerprint of the configuration; another one cannot continue from here.
        stages: depth.
        files: name -> (bytes, SHA-256).
        versions: of what wrote it; information only.
    """

    step: int
    config: str
    stages: int
    files: dict[str, tuple[int, str]]
    versions: dict[str, str]
    format: int = FORMAT

    def to_json(self) -> str:
        """One JSON object with a checksum of its own."""
        data = asdict(self)
        return json.dumps({**data, "sha256": _own_sum(data)}, indent=2) + "\n"


def _own_sum(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def folder_name(step: int) -> str:
    """Name of the folder of a checkpoint, e.g. ``step-000200``."""
    return f"step-{step:06d}"


def digest(path: Path) -> tuple[int, str]:
    """Length in bytes and SHA-256 of a file."""
    with path.open("rb") as file:
        sums = hashlib.file_digest(file, "sha256")
        return file.tell(), sums.hexdigest()


def read_meta(folder: Path) -> Meta:
    """The meta data of a checkpoint.

    Raises:
        TornError: missing or unreadable.
    """
    try:
        data = json.loads((folder / META).read_text())
        # Before the sum: another version may compute it over other fields.
        if data["format"] != FORMAT:
            raise OtherFormatError(data["format"])
        if data.pop("sha256") != _own_sum(data):
            raise TornError(f"{META} has another SHA-256 than what was written")
        files = {name: (int(size), str(sums)) for name, (size, sums) in data.pop("files").items()}
        meta = Meta(files=files, **data)
        if sorted(files) != sorted(stage_file(k) for k in range(meta.stages)):
            raise TornError(f"{META} lists {', '.join(files) or 'no files'} for {meta.stages} stages")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TornError(f"{META} cannot be read ({type(error).__name__}: {error})") from error
    return meta


def verify(folder: Path, names: Iterable[str] | None = None) -> Meta:
    """The meta data of a checkpoint whose files ``names``, by default all, are as written.

    Raises:
        TornError: a file is missing, or has another length or sum.
    """
    meta = read_meta(folder)
    for name in meta.files if names is None else names:
        path, (size, sums) = folder / name, meta.files.get(name, (0, ""))
        if not path.is_file():
            raise TornError(f"{name} is missing")
        found_size, found_sums = digest(path)
        # Said first, since it says more: a crash or a full disk cuts files off.
        if found_size != size:
            raise TornError(f"{name} has {found_size} bytes, {size} were written")
        if found_sums != sums:
            raise TornError(f"{name} has another SHA-256 than what was written")
    return meta
