"""The page: well-formed, complete, harmless whatever a model calls its layers, and alone: it needs no network."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from torch import Tensor, nn

import subbyte
from subbyte.report.page import page
from subbyte.report.stored import as_data
from subbyte.report.summary import Summary

VOID = {"meta", "input", "br", "hr", "img", "link"}
OPTIONAL_SLASH = {"rect", "path", "circle", "polyline"}
Many = Callable[[int], Summary]


class Page(HTMLParser):
    """What is on a page; refuses tags that are not balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.rows: dict[str, list[list[str]]] = {}
        self.section = ""
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        assert len(given) == len(attrs), f"an attribute twice in {tag}"
        self.tags.append((tag, given))
        if tag in ("section", "header"):
            self.section = given.get("id") or self.section
        if tag == "tr":
            self.rows.setdefault(self.section, []).append([])
        if tag in ("td", "th"):
            self.rows[self.section][-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in OPTIONAL_SLASH, f"<{tag}/>"
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> inside {self.open}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.texts.setdefault(self.section, []).append(data)
        if "td" in self.open or "th" in self.open:
            self.rows[self.section][-1][-1] += data

    def says(self, section: str) -> str:
        """Everything that a section says, words parted by one space."""
        return " ".join(" ".join(self.texts[section]).split())


@pytest.fixture(params=["fixed", "budgeted", "troubled", "many"])
def summary(request: pytest.FixtureRequest) -> Summary:
    made = request.getfixturevalue(request.param)
    if request.param == "budgeted":
        return made.summary([request.getfixturevalue("exported")], {"<b>top-1</b> %": (90.0, 89.5)})
    return made.summary() if isinstance(made, subbyte.Result) else made if isinstance(made, Summary) else made(300)


def test_it_is_well_formed_and_has_every_layer(summary: Summary) -> None:
    found = Page(page(summary))
    rows = found.rows["layers"]
    assert [row[1] for row in rows[1:]] == [layer.name for layer in summary.layers]
    assert {len(row) for row in rows} == {len(rows[0])}
    for layer, row in zip(summary.layers, rows[1:], strict=True):
        assert row[2:6] == [layer.weights, str(layer.activation_bits or "–"), f"{layer.float_bytes:,}", f"{layer.size_bytes:,}"]
        assert layer.solver in row and layer.kind in row
    assert f"All {len(summary.layers)} layers" in found.says("layers")
    identifiers = [given["id"] for _, given in found.tags if "id" in given]
    assert len(identifiers) == len(set(identifiers))
    assert {given["href"] for tag, given in found.tags if tag == "a"} <= {f"#{name}" for name in identifiers}


def test_it_needs_no_network_and_runs_its_own_script_only(summary: Summary) -> None:
    text = page(summary)
    found = Page(text)
    for tag, given in found.tags:
        assert tag not in {"link", "img", "iframe", "object", "embed", "base", "form", "image", "use"}, tag
        assert not {"src", "srcset", "xlink:href", "action", "background"} & set(given)
        assert not any(name.startswith("on") for name in given)
    assert set(re.findall(r"https?://[^\s\"']+", text)) <= {"http://www.w3.org/2000/svg"}  # a name, not an address that is loaded
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|import\(", text)
    policy = next(given["content"] for tag, given in found.tags if given.get("http-equiv") == "Content-Security-Policy")
    script = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert len(script) == 1 and policy is not None
    assert f"'sha256-{base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()}'" in policy
    assert policy.startswith("default-src 'none'")


def test_nothing_of_the_model_is_code(troubled: Summary) -> None:
    hostile = replace(troubled, model="</title><script>alert(1)</script>", asked='<img src="x" onerror="alert(1)">')
    text = page(hostile)
    found = Page(text)
    assert "<script>alert" not in text and "<img" not in text and "<b>its own" not in text
    assert [given.get("type") for tag, given in found.tags if tag == "script"] == ["application/json", None]
    assert "<script>alert('&amp;')</script>" in [row[1] for row in found.rows["layers"]]
    data = json.loads(re.findall(r'id="data">(.*?)</script>', text, re.DOTALL)[0])
    assert data["layers"][2]["name"] == "<script>alert('&amp;')</script>" and data["model"] == hostile.model


def test_the_json_is_the_summary(summary: Summary) -> None:
    data = json.loads(re.findall(r'id="data">(.*?)</script>', page(summary), re.DOTALL)[0])
    assert data == as_data(summary, 6)


def test_the_verdict_comes_first(budgeted: subbyte.Result, exported: subbyte.Exported) -> None:
    summary = budgeted.summary([exported], {"<b>top-1</b> %": (90.0, 89.5)})
    verdict = Page(page(summary)).says("verdict")
    assert f"{summary.float_bytes:,} → {summary.size_bytes:,} bytes, {summary.times_smaller:.2f} times smaller" in verdict
    assert f"loss {summary.loss:.3g}, with plain rounding {summary.measured.baseline_loss:.3g}" in verdict
    assert "<b>top-1</b> % 89.5 float model 90" in verdict and "predictions as the float model's" in verdict
    assert f"{exported.verification.speed:.2f} × float" in verdict and f"{exported.verification.size_bytes:,} bytes" in verdict
    for text in (*summary.warnings, *exported.warnings):
        assert " ".join(text.split()) in verdict


def test_what_went_wrong_is_said(troubled: Summary) -> None:
    found = Page(page(troubled))
    verdict = found.says("verdict")
    assert "too few samples" in verdict and "x" * 2000 in verdict and "Refinement taken back" in verdict
    first, second, third = found.rows["layers"][1:]
    assert first[-2] == "plain rounding kept solver had NaN " and second[-2] == "under-determined 100 unknowns, 10 equations "
    assert third[8] == "–"
    steps = found.rows["steps"]
    assert steps[-1][0] == "BiasTuning" and steps[-1][1] == "NaN" and "taken back" in steps[-1][3] and "it <diverged>" in steps[-1][5]
    assert ["(the model itself)", "Odd", "3", "<b>its own reason</b>"] in found.rows["float"]


def test_a_clean_run_says_so(fixed: subbyte.Result) -> None:
    clean = replace(fixed.summary(), warnings=(), left_out=())
    found = Page(page(clean))
    assert "Nothing to warn about" in found.says("verdict") and "Nothing: every module" in found.says("float")
    assert "Nothing to warn about" not in Page(page(fixed.summary())).says("verdict")
    assert "budget" not in found.texts and "onnx" not in found.texts


def test_the_budget_is_explained(budgeted: subbyte.Result) -> None:
    summary = budgeted.summary()
    planned = summary.planned
    assert planned is not None
    found = Page(page(summary))
    says = found.says("budget")
    assert "✓ proved optimal" in says and f"{planned.predicted:.4g}" in says and f"{planned.measured:.4g}" in says
    cut = replace(summary, planned=replace(planned, status="time limit", gap=12.0, limits=(replace(planned.limits[0], reached=9.0),)))
    says = Page(page(cut)).says("budget")
    assert "⚠ not proved optimal: time limit" in says and "at most 12 from the optimum" in says and "⚠ missed" in says
    rounds = [row for row in found.rows["budget"] if "returned" in row]
    assert len(rounds) == 1 and rounds[0][1] == f"{planned.size_bytes:,}"
    chart = [given for tag, given in found.tags if tag == "svg" and given.get("class") == "columns heat"]
    assert len(chart) == 1


def test_charts_are_described_for_those_who_cannot_see_them(budgeted: subbyte.Result) -> None:
    found = Page(page(budgeted.summary()))
    charts = [given for tag, given in found.tags if tag == "svg" and given.get("role") == "img"]
    known = {given["id"]: tag for tag, given in found.tags if "id" in given}
    assert len(charts) == 5
    for chart in charts:
        assert [known[name] for name in (chart["aria-labelledby"] or "").split()] == ["title", "desc"]
    others = [given for tag, given in found.tags if tag == "svg" and given.get("role") != "img"]
    assert all(given.get("aria-hidden") == "true" or given.get("role") == "presentation" for given in others)


def test_numbers_of_svgs_are_numbers(summary: Summary) -> None:
    for tag, given in Page(page(summary)).tags:
        if tag == "path":
            assert re.fullmatch(r"[MmHhVvLlZz0-9 .\-]*", given["d"] or ""), given["d"]
        for name in ("x", "y", "width", "height", "cx", "cy", "r"):
            if name in given and tag in OPTIONAL_SLASH | {"text"}:
                assert math.isfinite(float(given[name] or "nan"))


def test_a_thousand_layers_stay_readable(many: Many) -> None:
    text = page(many(1000))
    assert len(text.encode()) < 1_500_000 and len(page(many(40)).encode()) < 150_000
    names = re.findall(r'class="name"[^>]*>([^<]*)<', text)
    assert 4 * 20 <= len(names) <= 4 * 30 and "0.block.a_proj" in names, "labels should leave out what all names have in common"


def test_a_model_with_one_layer_and_one_option(samples: Tensor, tmp_path: Path) -> None:
    budget = subbyte.Budget(average_bits=4, choices=subbyte.Choices((4,), activation_bits=(8,)))
    result = subbyte.quantize(nn.Sequential(nn.Flatten(), nn.Linear(64, 5)).eval(), samples, budget=budget)
    result.write_report(tmp_path / "report.html")
    assert "proved optimal" in Page((tmp_path / "report.html").read_text(encoding="utf-8")).says("budget")
    with pytest.raises(subbyte.FileError, match="cannot write"):
        result.write_report(tmp_path / "missing" / "report.html")
