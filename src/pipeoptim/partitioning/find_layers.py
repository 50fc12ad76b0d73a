"""The layers of an ordinary model: named by the user, or found in what ran."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

from torch import nn

from pipeoptim.errors import ConfigError
from pipeoptim.partitioning.operation_log import ModuleExit, OperationLog

_LISTS = (nn.ModuleList, nn.Sequential)


def find_layers(model: nn.Module, log: OperationLog, given: str | Sequence[str] | None) -> list[str]:
    """Names of the modules behind which the model may be cut, in the order in which they return.

    Args:
        model: what ran.
        log: of the run.
        given: names of lists of layers or of single modules; by itself, the outermost members of all ``ModuleList`` and
            ``Sequential`` that ran once, or where there are none, the modules that the model itself calls.

    Raises:
        ConfigError: an unknown name, a module that runs never or several times, or nothing found.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    wanted = _given(modules, given) if given is not None else _found(model, modules, log)
    for name in wanted:
        if log.calls.get(name, 0) != 1:
            raise ConfigError(
                f"layer {name!r} runs {log.calls.get(name, 0)} times in a forward, a stage needs modules that run once; "
                "name other layers"
            )
        inside = next((other for other in wanted if other.startswith(f"{name}.")), None)
        if inside is not None:
            raise ConfigError(f"layer {inside!r} is a part of layer {name!r}; name one of them")
    order = [event.name for event in log.events if isinstance(event, ModuleExit) and event.name in set(wanted)]
    if not order:
        raise ConfigError(
            f"no layers were found in the {type(model).__name__}; name them, layers='path.to.the.list', "
            'or partition with how="trace"'
        )
    return order


def _given(modules: dict[str, nn.Module], given: str | Sequence[str]) -> list[str]:
    names: list[str] = []
    for name in [given] if isinstance(given, str) else given:
        if name not in modules:
            lists = [path for path, module in modules.items() if isinstance(module, nn.ModuleList)]
            close = get_close_matches(name, modules, n=1) or lists[:3] or list(modules)[1:4]
            raise ConfigError(f"layers names {name!r}, which the model does not have; did you mean {', '.join(close)}?")
        module = modules[name]
        inner = [f"{name}.{child}" for child, _ in module.named_children()] if isinstance(module, _LISTS) else [name]
        twice = set(inner) & set(names)
        if twice:
            raise ConfigError(f"layers names {min(twice)!r} twice; name every list or module once")
        names += inner
    return names


def _found(model: nn.Module, modules: dict[str, nn.Module], log: OperationLog) -> list[str]:
    members = [
        f"{path}.{child}" if path else child
        for path, module in modules.items()
        if isinstance(module, _LISTS)
        for child, _ in module.named_children()
    ]
    members = members or [name for name, _ in model.named_children()]
    ran = {name for name in members if log.calls.get(name) == 1}
    return [name for name in ran if not any(name.startswith(f"{other}.") for other in ran)]
