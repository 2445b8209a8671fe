"""The report as HTML: self-contained, safe with hostile names, and accessible."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_runs import HOSTILE, result

from graphopt.pipeline import PassRecord, Trace
from graphopt.report import PassRow, Report
from graphopt.report import html as html_module
from graphopt.report.html import html

VOID = {"meta", "br", "link", "hr", "img", "input"}


class Page(HTMLParser):
    """Collects the elements of a page and checks that they nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.setdefault(self._open[-1] if self._open else "", []).append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def page_text() -> str:
    return html(Report.of(result()))


def test_only_the_files_own_style_is_allowed(page_text: str) -> None:
    page = Page(page_text)
    policy = next(each["content"] for each in page.all("meta") if each.get("http-equiv") == "Content-Security-Policy")
    style = re.search(r"<style>(.*?)</style>", page_text, re.DOTALL)
    assert style is not None
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    assert "<" not in style[1]
    assert not any("style" in attributes for _, attributes in page.elements)


def test_nothing_is_loaded_and_nothing_runs(page_text: str) -> None:
    page = Page(page_text)
    assert not page.all("script")
    for _, attributes in page.elements:
        assert not {"src", "href", "srcset", "action", "background"} & set(attributes)
        assert not any(name.startswith("on") for name in attributes)
    assert "url(" not in page_text
    assert "@import" not in page_text


def test_hostile_names_are_text(page_text: str) -> None:
    """They come from the user's model: a node's name, a reason, a note, a recipe's name, an option."""
    assert "<script" not in page_text
    assert "".join(Page(page_text).words["li"]).count(HOSTILE) >= 1
    row = PassRow(0, HOSTILE, options={HOSTILE: HOSTILE}, stem=HOSTILE, rejected=HOSTILE)
    report = Report(HOSTILE, HOSTILE, HOSTILE, [HOSTILE], passes=[row], budget={HOSTILE: 1.0}, exceeded=[HOSTILE])
    record = PassRecord(0, "a", "a", f"{HOSTILE}\n", "before\n")
    text = html(dataclasses.replace(report, trace=Trace([record])))
    assert "<script" not in text
    assert HOSTILE in Page(text).words["ins"][0]


def test_the_page_can_be_read_by_all(page_text: str) -> None:
    page = Page(page_text)
    assert page.all("html")[0]["lang"] == "en"
    assert len(page.all("h1")) == 1
    assert len(page.all("caption")) == len(page.all("table")) >= 4
    assert all(each.get("scope") in ("col", "row") for each in page.all("th"))
    names = {each["id"] for _, each in page.elements if "id" in each}
    assert all(each["aria-labelledby"] in names for each in page.all("section"))


def test_the_page_says_what_the_report_says(page_text: str) -> None:
    page = Page(page_text)
    cells = [text.strip() for text in page.words["td"]]
    assert {"90", "89.5", "-0.5", "1 kB", "400 B", "0.4×"} <= set(cells)
    assert "its output is no integer" in cells
    assert any("Slower than the float export" in text for text in page.words["p"])
    assert any("budget.latency_ratio ≤ 0.9 does not hold" in text for text in page.words["li"])


def test_a_pass_that_changed_something_has_a_diff(page_text: str) -> None:
    page = Page(page_text)
    assert [text.strip() for text in page.words["summary"] if text.strip()][-1] == "002 code_weights"
    assert any(line.startswith("+") and "graphopt.dequantize" in line for line in page.words["ins"])
    assert any(line.startswith("-") and "@first.weight" in line for line in page.words["del"])


def test_a_long_diff_is_cut_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(html_module, "_MOST_LINES", 3)
    report = Report.of(result())
    text = html(report)
    lines = len(report.trace["code_weights"].diff().splitlines()) - 2
    assert f"{lines - 3} more lines are left out here" in text
    assert "trace/002_code_weights.txt" in text
    assert len(Page(text).all("ins")) + len(Page(text).all("del")) <= 3


def test_a_program_too_large_to_compare_is_pointed_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(html_module, "_MOST_TEXT_BYTES", 10)
    text = html(Report.of(result()))
    assert "too large to be compared here" in text
    assert not Page(text).all("ins")


def test_save_html_is_one_file(tmp_path: Path) -> None:
    Report.of(result()).save_html(tmp_path / "report.html")
    assert [each.name for each in tmp_path.iterdir()] == ["report.html"]
    Page((tmp_path / "report.html").read_text(encoding="utf-8"))


def test_an_empty_report_is_a_page() -> None:
    Page(html(Report()))
