"""The `heterostep` command. torch and diffusers are imported when a model is needed: `--help` answers at once."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

import heterostep
from heterostep import files, interrupts, launch
from heterostep.cli.batch import batch
from heterostep.cli.bench import bench
from heterostep.cli.compare import compare
from heterostep.cli.generate import generate, scene
from heterostep.cli.plan import plan
from heterostep.cli.serve import serve
from heterostep.cli.ui import ui
from heterostep.errors import HeterostepError, first_line

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
for _command in (plan, bench, scene, generate, batch, serve, compare, ui):
    app.command()(_command)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"heterostep {heterostep.__version__}")
        raise typer.Exit


@app.callback()
def _app(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Video diffusion in a fraction of the time, without training."""


# Options that had other names; these go on working for one version.
RENAMED = {"--between": "--sparse-share"}
# What a number must be, by the kinds of faults that pydantic names: typer checks numbers with it.
NUMBER_FAULTS = {
    "int_parsing": "a whole number",
    "int_parsing_size": "a smaller number",
    "float_parsing": "a number",
    "greater_than_equal": "at least {ge:,}",
    "less_than_equal": "at most {le:,}",
}


def _renamed(arguments: Sequence[str]) -> list[str]:
    """Arguments with the options of today."""
    translated = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name in RENAMED:
            typer.echo(f"heterostep: {name} is called {RENAMED[name]} now", err=True)
            name = RENAMED[name]
        translated.append(name + equals + value)
    return translated


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; every fault is one line on stderr.

    Returns:
        0; 1 where a plan does not fit; 2 for a fault; 130 after Ctrl-C.
    """
    try:
        with interrupts.watched():
            launch.follow()
            given = _renamed(sys.argv[1:] if arguments is None else arguments)
            code = app(given, prog_name="heterostep", standalone_mode=False, obj=given)
    except HeterostepError as error:
        return _fail(_by_option(error), 2)
    except OSError as error:
        return _fail(files.told(error), 2)
    except typer.TyperException as error:
        return _fail(_told(error), 2)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except Exception as error:
        if launch.tell(f"{type(error).__name__}: {first_line(error)}", clear=False):
            return 2
        raise
    if code == 130:
        return _fail("interrupted", 130)
    return code or 0


def _by_option(error: HeterostepError) -> str:
    """A fault, beginning with the option that it is about as the command writes it."""
    message, field = first_line(error), error.field or ""
    option = f"--{field.replace('_', '-')}"
    commands: Any = typer.main.get_command(app)
    if not any(option in each.opts for command in commands.commands.values() for each in command.params):
        return message
    names_it = message.startswith((f"{field} ", f"{field}="))
    return option + message.removeprefix(field) if names_it else f"{option}: {message}"


def _told(error: typer.TyperException) -> str:
    """A fault of the command line, and where to read more."""
    message = _number_fault(error) or first_line(Exception(error.format_message()))
    message = message.replace("Value error, ", "").removesuffix(".")
    context = getattr(error, "ctx", None)
    return message if context is None else f"{message}; see {context.command_path} --help"


def _number_fault(error: Any) -> str | None:
    """What is wrong with an option's number; None where the fault is another."""
    for fault in getattr(error.__cause__, "errors", list)():
        if rule := NUMBER_FAULTS.get(fault["type"]):
            bounds, given = fault.get("ctx", {}), fault["input"][:20]
            rule = rule.format(**bounds).removesuffix(".0")
            return f"{error.param.opts[0]} must be {rule}, not {given if bounds else repr(given)}"
    return None


def _fail(message: str, code: int) -> int:
    if not launch.tell(message, clear=code == 2):
        typer.echo(f"heterostep: {message}", err=True)
    return code
