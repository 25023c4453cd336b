"""What the README says is true: its example runs, its commands have these options, its exit codes are the program's."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
import typer

import subbyte
from subbyte import tasks
from subbyte.cli.commands import app
from subbyte.cli.program import CODES, DEFECT, INTERRUPTED

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FIRST_SCREEN = README.split("\n## ")[0]


def blocks(text: str, language: str = "") -> list[str]:
    return [body for tag, body in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE) if tag == language]


def test_the_first_screen_has_two_commands_and_an_example() -> None:
    (commands,) = blocks(FIRST_SCREEN)
    assert [line.split("#")[0].strip() for line in commands.splitlines()] == ["make demo", "make test"]
    (example,) = blocks(FIRST_SCREEN, "python")
    assert len(example.splitlines()) <= 12
    assert len(FIRST_SCREEN.splitlines()) <= 40


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (example,) = blocks(FIRST_SCREEN, "python")
    names: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), names)
    result, model, task = names["result"], names["model"], names["task"]
    assert isinstance(result, subbyte.Result) and isinstance(model, torch.nn.Module) and isinstance(task, tasks.Task)
    assert (tmp_path / "digits.subbyte.safetensors").stat().st_size == result.size_bytes
    assert torch.equal(model(task.calibration), result.model(task.calibration))
    receipt, sample = str(result).splitlines(), blocks(README.split("## What the receipt says")[1])[0].splitlines()
    printed = capsys.readouterr().out
    assert printed.startswith(receipt[0]) and re.search(r"^float \d\d\.\d %, quantized \d\d\.\d %$", printed, re.MULTILINE)
    named = [line.split()[:5] for line in receipt[2:8]]
    assert [line.split()[:5] for line in sample[2:8]] == named, "the README's receipt is out of date"
    assert sample[0].split() == receipt[0].split() and f"{result.size_bytes:,} bytes" in "\n".join(sample)


def test_the_commands_and_options_exist() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    lines = [line for block in blocks(README) for line in block.replace("\\\n", " ").splitlines() if line.startswith("subbyte ")]
    assert {line.split()[1] for line in lines} == set(commands)
    for line in lines:
        known = {option for parameter in commands[line.split()[1]].params for option in parameter.opts}
        assert {word for word in shlex.split(line) if word.startswith("--")} <= known, line
    everywhere = {
        option for command in commands.values() for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)
    }
    assert set(re.findall(r"`(--[a-z0-9-]+)", README)) <= everywhere


def test_the_exit_codes_are_the_programs() -> None:
    told = {(int(code), kind) for code, kind in re.findall(r"^\| (\d+) \| (?:`(\w+)` )?\|", README, re.MULTILINE)}
    assert told == {(0, ""), (DEFECT, "defect"), (INTERRUPTED, "interrupted")} | {(code, kind) for kind, code in CODES.values()}


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links and [link for link in links if not link.startswith("https://") and not (ROOT / link).exists()] == []
