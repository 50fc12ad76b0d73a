"""Assembles the command line and turns errors into one line and an exit code.

Every module ``commands/<name>.py`` with a function ``<name>`` is a command: its docstring is the help, its parameters are
the options. A ``typer.Typer`` of that name is a group of commands. Nothing here, and nothing at the top of a command's file,
imports torch.
"""

from __future__ import annotations

import errno
import importlib
import os
import pkgutil
import re
import sys
from itertools import pairwise
from typing import Annotated

import typer

from pipeoptim.errors import ConfigError, PipeOptimError
from pipeoptim.explained import is_named
from pipeoptim.version import __version__

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 130

#: A path that this user gave and cannot use: bad input, where a full or broken disk is a failure.
CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)

_HUGE = re.compile(r"""(['"])(?:(?!\1).){400,}\1""", re.DOTALL)

HELP = """Asynchronous pipeline training that learns like synchronous training.

A first run, on text that every Python has, in a few minutes on any machine:

    pipeoptim train

A command explains itself with examples:

    pipeoptim train --help
"""


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pipeoptim {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    pass


def build() -> typer.Typer:
    """The application with every command in ``pipeoptim.cli.commands``."""
    from pipeoptim.cli import commands

    app = typer.Typer(name="pipeoptim", help=HELP, rich_markup_mode=None)
    app.callback(help=HELP)(_root)
    for info in sorted(pkgutil.iter_modules(commands.__path__), key=lambda info: info.name):
        if not info.name.startswith("_"):
            command = getattr(importlib.import_module(f"{commands.__name__}.{info.name}"), info.name)
            if isinstance(command, typer.Typer):
                for one in command.registered_commands:
                    one.short_help = _first_line(one.callback.__doc__)
                app.add_typer(command, name=info.name, short_help=_first_line(command.info.help))
            else:
                app.command(info.name, short_help=_first_line(command.__doc__))(command)
    return app


def _first_line(help: object) -> str:
    """Of a command's help, whole: lists of commands would cut it off."""
    return str(help or "").strip().splitlines()[0] if help else ""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 bad input, 128 + n stopped by signal n (130 by Ctrl-C)."""
    sys.exit(_run(arguments))


def _run(arguments: list[str] | None) -> int:
    arguments = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        code = build()(args=arguments, prog_name="pipeoptim", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except ConfigError as error:
        return _fail(_with_topic(error), EXIT_BAD_INPUT)
    except PipeOptimError as error:
        from pipeoptim.train.signals import AbortedError, exit_code

        return _fail(str(error), exit_code(error.number) if isinstance(error, AbortedError) else EXIT_FAILED)
    except KeyboardInterrupt:
        return _fail("interrupted before anything was saved", EXIT_INTERRUPTED)
    except OSError as error:
        from pipeoptim.files import cause_of

        if error.errno in CLOSED:
            return _fail(f"{cause_of(error)}; choose another path, or make it accessible to you", EXIT_BAD_INPUT)
        return _fail(cause_of(error), EXIT_FAILED)
    except Exception as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error)
            return 0
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # typer's own: an option it cannot read
            return _fail(f"{_with_value(error.format_message(), arguments).rstrip('.')}; see --help", EXIT_BAD_INPUT)
        raise


def _with_topic(error: ConfigError) -> str:
    """The message, and what ``pipeoptim explain`` takes: named in the message where it is explained, else its topic in brackets."""
    message = str(error)
    return f"{message} [{error.topic}]" if error.topic and not is_named(message) else message


def _with_value(message: str, arguments: list[str]) -> str:
    """Typer names the option that it could not read, but not always the value."""
    named = re.search(r"'(--[\w-]+)'", message)
    values = dict(pairwise(arguments)) | dict(a.split("=", 1) for a in arguments if "=" in a)
    value = values.get(named[1]) if named else None
    return message if value is None or value in message else f"{named[1] if named else ''} is {value!r}: {message}"


def _begun(value: re.Match[str]) -> str:
    """Of a value of several hundred characters, only the beginning is said again."""
    return f"{value[0][:80]}...{value[1]}"


def _fail(message: str, code: int) -> int:
    """Print one line on stderr; under torchrun only the first process does."""
    if os.environ.get("RANK", "0") == "0" or code != EXIT_BAD_INPUT:
        print(f"pipeoptim: {' '.join(_HUGE.sub(_begun, message).split())}", file=sys.stderr)
    return code
