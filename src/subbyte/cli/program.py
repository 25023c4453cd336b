"""The program around the commands: errors become one message and an exit code.

  0  done
  1  a defect in subbyte itself
  2  an option that cannot be served
  3  the model cannot be loaded or quantized
  4  the data cannot be used
  5  a packed file cannot be read or written
130  interrupted
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated

import typer

from subbyte.cli.reporting import app
from subbyte.cli.show import as_json
from subbyte.errors import DataError, FileError, LayerError, ModelError, OptionError
from subbyte.run.freed_memory import keep_freed_memory

__all__ = ["main"]

CODES = {OptionError: ("option", 2), ModelError: ("model", 3), DataError: ("data", 4), FileError: ("file", 5)}
DEFECT = 1
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and end the program.

    Args:
        arguments: what stands behind the program's name; None takes those of the process.

    Raises:
        SystemExit: always, with the exit code that the module's docstring lists.

    Example:
        >>> main(["--version"])
        Traceback (most recent call last):
        SystemExit: 0
    """
    keep_freed_memory()
    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        code = typer.main.get_command(app).main(args=given, prog_name="subbyte", standalone_mode=False) or 0
    except Exception as error:  # noqa: BLE001 - the program's edge: whatever it is, the user gets one message and a code
        if "--debug" in given:
            traceback.print_exc()
        code = _report(error, machine="--json" in given)
    if code == INTERRUPTED:
        _say("interrupted", "stopped before the end; a packed file is written whole or not at all", machine="--json" in given)
    sys.exit(code)


def _report(error: Exception, *, machine: bool) -> int:
    """Say what went wrong; returns the exit code."""
    if isinstance(error, typer.TyperException):  # the command line itself: unknown option, missing value
        _say("option", f"{error.format_message()} See 'subbyte --help'.", machine=machine)
        return error.exit_code
    for family, (kind, code) in CODES.items():
        if isinstance(error, family):
            _say(kind, str(error), machine=machine, layer=error.layer if isinstance(error, LayerError) else None)
            return code
    _say("defect", f"{type(error).__name__}: {error}; this is a defect in subbyte, --debug shows where", machine=machine)
    return DEFECT


def _say(kind: str, message: str, *, machine: bool, layer: str | None = None) -> None:
    if machine:
        typer.echo(as_json({"error": {"kind": kind, "message": message} | ({} if layer is None else {"layer": layer})}))
    typer.echo(f"error: {message}", err=True)


def _show_version(value: bool) -> None:  # noqa: FBT001 - typer calls it so
    if value:
        typer.echo(f"subbyte {version('subbyte')}")
        raise typer.Exit


@app.callback(
    epilog="Exit codes: 0 done; 1 a defect in subbyte; 2 an option cannot be served; 3 the model cannot be loaded or quantized; 4 the data "
    "cannot be used; 5 a packed file cannot be read or written; 130 interrupted by Ctrl-C."
)
def _program(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")] = False,  # noqa: FBT002
) -> None:
    """Post-training quantization below eight bits, from a trained model and a few hundred unlabeled samples."""
