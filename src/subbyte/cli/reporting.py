"""The command that shows a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from subbyte.cli.budget_options import RunArgument
from subbyte.cli.deployment import app
from subbyte.cli.options import DebugOption, ForceOption, JsonOption, check_free
from subbyte.cli.show import as_json
from subbyte.report.page import page
from subbyte.report.stored import load_summary
from subbyte.run.files import write_file

__all__ = ["app"]

REPORT_NAME = "report.html"

PageOption = Annotated[Path | None, typer.Option("--out", metavar="FILE", help=f"The HTML file. Default {REPORT_NAME} in the run folder.")]


@app.command(short_help="Show a run as an HTML page.")
def report(
    run: RunArgument,
    out: PageOption = None,
    force: ForceOption = False,  # noqa: FBT002
    as_json_object: JsonOption = False,  # noqa: FBT002
    debug: DebugOption = False,  # noqa: FBT002
) -> None:
    """Show the last run that ended in a run folder as an HTML page: every layer, the budget, its frontier and proof, the steps, the ONNX
    files that 'export --packed RUN/model.subbyte.safetensors' has written since, and what was chosen.

    The page is one file that loads nothing from the network. Neither the model nor the data is needed.
    """
    path = run / REPORT_NAME if out is None else out
    summary = load_summary(run)
    check_free(path, force=force)
    content = page(summary).encode()
    write_file(path, content)
    typer.echo(as_json({"out": str(path), "bytes": len(content)}) if as_json_object else f"wrote {path}, {len(content):,} bytes")
