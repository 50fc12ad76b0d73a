"""What users name on a command line or in a configuration: ``module:name``, or ``file.py:name``; the same for models, data, recipes,
optimizers and methods.

Modules are looked for where Python looks, then in the folder where the command runs. Whether a name may be imported at all has been
decided before (:mod:`pipeoptim.train.trust`).
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from zlib import crc32


def import_target(target: str) -> Any:
    """The object that ``target`` names.

    Raises:
        ValueError: it is not of one of the two forms.
        ImportError, OSError, AttributeError: no such module, file, or name in it.

    Example:
        >>> import_target("math:pi") > 3
        True
    """
    where, colon, name = target.rpartition(":")
    if not (where and colon and name):
        raise ValueError("it is neither module:name nor file.py:name")
    return getattr(_from_file(Path(where)) if where.endswith(".py") else _from_module(where), name)


def _from_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.partition(".")[0] or {"", os.getcwd()} & set(sys.path):
            raise
    # A command's own path does not have the present folder. Last in the row, so that a file never shadows an installed module; and it
    # stays there, for what the module imports later.
    sys.path.append(os.getcwd())
    importlib.invalidate_caches()
    return importlib.import_module(name)


def _from_file(path: Path) -> ModuleType:
    # Under a name of its own, so that it never shadows a module either, and once, so that its classes are the same each time.
    path = path.resolve()
    name = f"pipeoptim_user_{path.stem}_{crc32(bytes(path))}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
