"""What is known of an option besides its name and type: of a pipeline (:class:`Option`), and of a training run (:class:`Setting`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipeoptim.errors import ConfigError, did_you_mean
from pipeoptim.options.checks import Check, one_of

if TYPE_CHECKING:
    from pipeoptim.methods import Method


@dataclass(frozen=True)
class Setting:
    """A field of a :class:`~pipeoptim.config.TrainConfig`, and an option of the command line: a value that fits into JSON.

    Args:
        default: its value where none is given.
        help: its meaning, in plain words.
        least, most: bounds of a whole number.
        choices: of a name.
        optional: whether an empty name stands for none.
        check_value: applied to every value.
        offered: whether ``pipeoptim train`` has an option for it.
        computes: whether it changes what a run computes. What does not may differ in the two halves of a resumed run.
        only_with: the setting that it says more about, without which it has no effect; ``name=value`` where only that value gives it one.
        type: str, int, float or bool, perhaps with ``| None``; by default the type of ``default``.
    """

    default: Any
    help: str
    least: int | None = None
    most: int | None = None
    choices: tuple[str, ...] = ()
    optional: bool = False
    check_value: Check | None = None
    offered: bool = True
    computes: bool = True
    only_with: str = ""
    type: str = ""

    @property
    def type_name(self) -> str:
        """The type as it is written in an annotation."""
        return self.type or type(self.default).__name__

    def check(self, name: str, value: Any) -> None:
        """Raises ConfigError for a value that is out of bounds, that is none of the choices, or that ``check_value`` refuses."""
        if self.least is not None:
            if isinstance(value, bool) or not isinstance(value, int) or value < self.least:
                raise ConfigError(f"{name} is {value!r}, must be an integer of at least {self.least}")
            if self.most is not None and value > self.most:
                raise ConfigError(f"{name} is {value}, must be at most {self.most}")
        if self.optional and value not in ("", *self.choices):
            wanted = " or ".join(map(repr, self.choices))
            raise ConfigError(f"{name} is {value!r}, must be {wanted}, or '' for none{did_you_mean(value, self.choices)}")
        if self.choices and not self.optional:
            one_of(self.choices)(name, value)
        if self.check_value is not None:
            self.check_value(name, value)


@dataclass(frozen=True)
class Need:
    """What a method must do for an option to take effect under it.

    Args:
        met_by: whether a method does it.
        otherwise: what to say of a method that does not, after its name.
    """

    met_by: Callable[[Method], bool]
    otherwise: str


@dataclass(frozen=True)
class Option:
    """What is known of an option of pipelines besides its name, its type in the engine and its default.

    Args:
        help: its meaning, in plain words.
        check: applied to every value that is not the default; returns the form that the engine uses.
        agreed: what all processes of a pipeline must agree on, as a sentence; empty where each may have its own.
        describe: how error messages show its value.
        given: the type in which users give it, where that is not the type of the field.
        between_processes: whether it only has a meaning where stages live in several processes.
        in_runs: whether a training run has a setting of the same name, type, default, meaning and check.
        settings: where it does not: the settings of a run that say it, by name; none where a run has no such option.
        of_run: what the pipeline is given, from an object with the values of ``settings``.
        needs: what a method must do for the option to take effect; under others it is refused, not ignored.
        idle: values, besides the default, that ask for nothing and are taken under every method.
    """

    help: str
    check: Check
    agreed: str = ""
    describe: Callable[[Any], str] = str
    given: str = ""
    between_processes: bool = False
    in_runs: bool = False
    settings: Mapping[str, Setting] = field(default_factory=dict)
    of_run: Callable[[Any], Any] | None = None
    needs: Need | None = None
    idle: tuple[Any, ...] = ()
