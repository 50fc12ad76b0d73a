"""Which functions of a run directory's ``config.json`` may be called: those that a command line or an entry point has named.

A run directory may come from somebody else, and ``config.json`` names functions: ``os:system`` would be one. So a resumed run may only
use what the recipe names that an entry point or this command line names. A run of a recipe of one's own is signed when it begins,
with a key that only this user can read: this user's command line has named its functions before.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import stat
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeoptim.config import TrainConfig
from pipeoptim.errors import ConfigError
from pipeoptim.files import write_durably
from pipeoptim.named_calls import read_calls

COMPONENTS = ("model", "data", "optimizer", "lr_schedule")
"""Fields of a configuration that are a function and its options. Besides these, a method may be one of the user's own."""

CALLED = ("callbacks", "loggers")
"""Fields that name classes and their options."""

SIGNATURE = "config.sig"


def targets_of(config: TrainConfig) -> dict[str, list[str]]:
    """Field -> the ``module:name`` and ``file.py:name`` in it. Short names are looked up in lists of this library and need no trust."""
    found = {what: getattr(config, what).target.split(",") for what in COMPONENTS} | {"method": [config.method]}
    found |= {what: [call.name for call in read_calls(what, getattr(config, what))] for what in CALLED}
    return {what: [t.strip() for t in targets if ":" in t] for what, targets in found.items()}


def named_targets(
    recipe: str | None, tiny: bool, optimizer: str | None, changed: Mapping[str, Any], *others: str | None
) -> set[str]:
    """What a command line names: the functions of ``--recipe``, those in ``--optimizer`` and in ``changed`` settings, and ``others``."""
    from pipeoptim.train.recipes import get_recipe

    named = {part.strip() for part in [*(optimizer or "").split(","), changed.get("method", ""), *filter(None, others)]}
    named |= {call.name for what in CALLED for call in read_calls(what, changed.get(what, ""))}
    if recipe is not None:
        named |= {target for targets in targets_of(get_recipe(recipe, tiny)).values() for target in targets}
    return named


def check_trusted(folder: Path, config: TrainConfig, named: Collection[str] = ()) -> None:
    """Called before anything in ``config``, which was read from ``folder``, is imported.

    Args:
        named: ``module:function`` that the command line names.

    Raises:
        ConfigError: a function that nobody named.
    """
    if _is_signed(folder, config):
        return
    known = {*named, *_of_recipe(config.recipe)}
    for what, targets in targets_of(config).items():
        for target in targets:
            if target not in known:
                raise ConfigError(
                    f"{folder / 'config.json'} has {what} {target!r}, which neither this command line nor a registered recipe names; the "
                    "run was begun elsewhere, or the file was changed. If you trust it, give --recipe module:function (and "
                    "--model, --data, --optimizer, --method, --callbacks, --loggers) as when it was begun"
                )


def sign(folder: Path, config: TrainConfig) -> None:
    """Note that this user's own command named the functions of ``config``. Where no key can be kept, resuming needs ``--recipe``."""
    key = _key(make=True)
    if key is not None and any(targets_of(config).values()):
        write_durably(folder / SIGNATURE, _signature(key, config) + "\n")


def _is_signed(folder: Path, config: TrainConfig) -> bool:
    key = _key(make=False)
    try:
        found = (folder / SIGNATURE).read_text(errors="replace").strip()
    except OSError:
        return False
    return key is not None and hmac.compare_digest(found.encode(), _signature(key, config).encode())


def _signature(key: bytes, config: TrainConfig) -> str:
    """Of all that says what is called, and with what."""
    parts = {what: asdict(getattr(config, what)) for what in COMPONENTS}
    called = {what: getattr(config, what) for what in CALLED if getattr(config, what)}
    text = json.dumps({**parts, **called, "method": config.method}, sort_keys=True)
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()


def _of_recipe(name: str) -> set[str]:
    """The functions of a recipe that an entry point has registered; none if there is no such recipe."""
    from pipeoptim.train.recipes import get_recipe

    if ":" in name:
        return set()
    base, tiny = name.removesuffix("-tiny"), name.endswith("-tiny")
    try:
        config = get_recipe(base, tiny)
    except ConfigError:
        return set()
    return {target for targets in targets_of(config).values() for target in targets}


def _key(make: bool) -> bytes | None:
    """This user's key; None where there is none, or where others could read it."""
    root = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    path = Path(root).expanduser() / "pipeoptim" / "run-key"
    try:
        if make and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(os.urandom(32))
        # Opened first and looked at then: nobody can put another file in its place in between.
        with path.open("rb") as file:
            about = os.fstat(file.fileno())
            private = about.st_uid == os.geteuid() and not about.st_mode & (stat.S_IRWXG | stat.S_IRWXO)
            key = file.read()
    except (OSError, RuntimeError):  # no home at all is a RuntimeError
        return None
    return key if private and len(key) == 32 else None
