"""The report as HTML: self-contained, safe with hostile names, and accessible."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_runs import HOSTILE, result

from graphopt.pipeline import PassRecord, Trace
from graphopt.report import PassRow, Report, explorer
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


def test_only_the_files_own_style_and_script_are_allowed(page_text: str) -> None:
    page = Page(page_text)
    policy = next(each["content"] for each in page.all("meta") if each.get("http-equiv") == "Content-Security-Policy")
    style = re.search(r"<style>(.*?)</style>", page_text, re.DOTALL)
    script = re.search(r"<script>(.*?)</script>", page_text, re.DOTALL)
    assert style is not None and script is not None
    found = [base64.b64encode(hashlib.sha256(each[1].encode()).digest()).decode() for each in (style, script)]
    assert policy == (
        f"default-src 'none'; style-src 'sha256-{found[0]}'; script-src 'sha256-{found[1]}'; "
        "base-uri 'none'; form-action 'none'"
    )
    assert "<" not in style[1] and "</" not in script[1] and "<!--" not in script[1]
    assert not any("style" in attributes for _, attributes in page.elements)


def test_nothing_is_loaded(page_text: str) -> None:
    page = Page(page_text)
    assert [each.get("type") for each in page.all("script")] == ["application/json", None]
    for _, attributes in page.elements:
        assert not {"src", "srcset", "action", "background"} & set(attributes)
        assert (attributes.get("href") or "#").startswith("#")
        assert not any(name.startswith("on") for name in attributes)
    assert "url(" not in page_text and "@import" not in page_text
    assert not any(each in page_text for each in ("fetch(", "XMLHttpRequest", "innerHTML", "eval(", "import("))


def test_hostile_names_are_text(page_text: str) -> None:
    """They come from the user's model: a node's name, a reason, a note, a recipe's name, an option."""
    assert len(Page(page_text).all("script")) == 2
    assert "".join(Page(page_text).words["li"]).count(HOSTILE) >= 1
    row = PassRow(0, HOSTILE, options={HOSTILE: HOSTILE}, stem=HOSTILE, rejected=HOSTILE)
    report = Report(HOSTILE, HOSTILE, HOSTILE, [HOSTILE], passes=[row], budget={HOSTILE: 1.0}, exceeded=[HOSTILE])
    record = PassRecord(0, "a", "a", f"{HOSTILE}\n</script><!--\n", "before\n")
    text = html(dataclasses.replace(report, trace=Trace([record])))
    assert len(Page(text).all("script")) == 2
    data = json.loads(Page(text).words["script"][0])
    assert data["lines"] == [HOSTILE, "</script><!--"] and data["passes"][0]["key"] == HOSTILE


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


def test_the_page_says_where_the_error_comes_from_and_what_helps(page_text: str) -> None:
    page = Page(page_text)
    said = " ".join(" ".join(page_text.split()).split())
    assert "all of them together leave 9.0 dB" in said and "on 3 samples" in said
    assert f"the rounding of {HOSTILE} is 8 times as coarse as it need be" in "".join(page.words["li"])
    assert any("error -62 %, size +1.1 %" in text for text in page.words["li"])
    cells = {text.strip() for text in page.words["td"]}
    assert {"75 %", "10.0 dB", "12.0 dB", "int4"} <= cells
    assert len([each for each in page.all("rect") if each.get("class") == "outline"]) == 6
    links = [each["href"] for each in page.all("a")]
    assert "#pass=code_weights&node=linear" in links and "#pass=code_weights" in links
    without = html(dataclasses.replace(Report.of(result()), causes=None))
    assert "Where the error comes from" not in without


def test_the_data_hold_every_program(page_text: str) -> None:
    data = json.loads(Page(page_text).words["script"][0])
    trace = Report.of(result()).trace
    for record, each in zip(trace, data["passes"], strict=True):
        assert each["key"] == record.key and each["changed"] == record.changed
        lines = [data["lines"][line] for line in each["text"]]
        assert lines == (record.text.splitlines() if record.changed or record.index == 0 else [])
    assert len(set(data["lines"])) == len(data["lines"])


def test_programs_too_large_to_keep_are_pointed_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explorer, "_MOST_BYTES", 10)
    data = json.loads(Page(html(Report.of(result()))).words["script"][0])
    assert data["lines"] == [] and data["passes"][0]["text"] is None
    assert data["passes"][0]["stem"] == "000_capture"


def test_save_html_is_one_file(tmp_path: Path) -> None:
    Report.of(result()).save_html(tmp_path / "report.html")
    assert [each.name for each in tmp_path.iterdir()] == ["report.html"]
    Page((tmp_path / "report.html").read_text(encoding="utf-8"))


def test_notebooks_show_results_reports_and_traces() -> None:
    run = result()
    for shown in (run, Report.of(run)):
        page = Page(shown._repr_html_())
        assert "budget.latency_ratio ≤ 0.9 does not hold" in " ".join(page.words["li"])
        assert {"metric", "90", "89.5", "code_weights"} <= {text.strip() for text in page.words["td"]}
        assert not page.all("script")
    page = Page(run.trace._repr_html_())
    assert len(page.all("tr")) == 1 + len(run.trace)
    assert Page(Trace([PassRecord(0, HOSTILE, HOSTILE, "")])._repr_html_()).words["td"][1] == HOSTILE


def test_an_empty_report_is_a_page() -> None:
    Page(html(Report()))
