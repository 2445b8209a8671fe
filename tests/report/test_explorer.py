"""The explorer of a report in a real Chromium: by keyboard, by link, by search, and with nothing but its own file."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_runs import HOSTILE, result

from graphopt.ir.rewriter import Site
from graphopt.pipeline import PassRecord, Trace
from graphopt.report import Report

playwright = pytest.importorskip("playwright.sync_api", reason="the tests of the explorer need playwright")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def _installed() -> str | None:
    """Return a browser of the system, or None for playwright's own."""
    return next((found for name in BROWSERS if (found := shutil.which(name))), None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        try:
            made = driver.chromium.launch(executable_path=_installed(), args=options)
        except playwright.Error as error:
            pytest.skip(f"no Chromium can be started here: {str(error).splitlines()[0]}")
        yield made
        made.close()


# Whether a screen reader has words for an element: a label, a title, or its own text.
_NAMED = """(each) => {
  const by = each.getAttribute("aria-labelledby");
  const words = [each.getAttribute("aria-label"), by && document.getElementById(by)?.textContent, each.textContent,
    ...[...(each.labels || [])].map((label) => label.textContent)];
  return words.some((text) => text && text.trim());
}"""


class Opened:
    """A page with what it said and asked for."""

    def __init__(self, browser: Any, path: Path, place: str = "", **options: Any) -> None:
        self.context = browser.new_context(viewport={"width": 1300, "height": 900}, **options)
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri() + place)
        self.page.wait_for_selector("#explorer:not([hidden])")

    def __enter__(self) -> Any:
        return self.page

    def __exit__(self, *_: object) -> None:
        self.context.close()
        assert self.said == []
        assert len(self.asked) == 1 and self.asked[0].startswith("file:")


@pytest.fixture(scope="module", name="report")
def fixture_report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three programs, with a pass between that found nothing to do."""
    run = result()
    last = run.trace.records[-1]
    idle = PassRecord(len(run.trace), "idle", "idle", last.text, last.text)
    idle.skipped = [Site("relu", HOSTILE)]
    run.trace.records.append(idle)
    path = tmp_path_factory.mktemp("report") / "report.html"
    Report.of(run).save_html(path)
    return path


def made_up(nodes: int, passes: int = 2) -> Trace:
    """Programs of a chain of nodes; each pass changes a tenth of them."""
    drawn = random.Random(0)
    lines = [f"  node_{k}: f32[8] = relu({f'node_{k - 1}' if k else 'x'})" for k in range(nodes)]
    texts = ["\n".join(["program(x: f32[8])", "{", *lines, f"  return node_{nodes - 1}", "}"]) + "\n"]
    for at in range(passes):
        for k in drawn.sample(range(nodes), nodes // 10):
            lines[k] = lines[k].partition(" = ")[0] + f" = gelu_{at}({f'node_{k - 1}' if k else 'x'})"
        texts.append("\n".join(["program(x: f32[8])", "{", *lines, f"  return node_{nodes - 1}", "}"]) + "\n")
    keys = ["capture", *(f"pass_{at}" for at in range(passes))]
    pairs = enumerate(zip(keys, texts, strict=True))
    return Trace([PassRecord(k, key, key, text, texts[max(k - 1, 0)]) for k, (key, text) in pairs])


def saved(trace: Trace, path: Path) -> Path:
    run = result()
    run.trace = trace
    Report.of(run).save_html(path)
    return path


def test_a_pass_is_reached_by_keyboard(browser: Any, report: Path) -> None:
    with Opened(browser, report) as page:
        page.locator("#pass-list [aria-current]").focus()
        page.keyboard.press("Home")
        assert page.locator("#pass-title").inner_text() == "000 capture"
        page.keyboard.press("End")
        assert page.locator("#pass-title").inner_text() == "002 code_weights"
        assert page.evaluate("document.activeElement.dataset.pass") == "2"
        assert any("graphopt.dequantize" in each for each in page.locator("#pass-diff .add").all_inner_texts())
        assert page.locator("#pass-diff .remove").count() > 0
        assert page.url.endswith("#pass=code_weights")
        page.go_back()
        assert page.locator("#pass-title").inner_text() == "000 capture"


def test_a_pass_that_changed_nothing_appears_on_demand(browser: Any, report: Path) -> None:
    with Opened(browser, report) as page:
        assert "idle" not in page.locator("#pass-list").inner_text()
        page.get_by_label("Passes that changed nothing, too").check()
        page.get_by_role("button", name="003 idle").click()
        assert "the same before and after" in page.locator("#pass-diff").inner_text()


def test_a_link_lands_on_its_node(browser: Any, report: Path) -> None:
    with Opened(browser, report, "#pass=code_weights&node=relu") as page:
        row = page.locator("#pass-diff [aria-current]")
        assert "relu" in row.inner_text()
        top = row.bounding_box()["y"]
        assert 0 <= top <= 900  # where it can be seen
        assert page.locator("#place-title").inner_text() == "relu"
        story = page.locator("#story").inner_text()
        assert "000 capture" in story and HOSTILE in story
        assert page.locator("#graphs svg .chosen").count() == 2
        page.locator("#graphs svg .box").first.click()
        assert "node=relu" not in page.url and "&node=" in page.url
        page.goto(report.as_uri() + "#pass=nothing&node=nowhere")
        assert "No program that is kept here has it." in page.locator("#story").inner_text()


def test_a_place_shows_what_became_of_its_values(browser: Any, report: Path) -> None:
    with Opened(browser, report, "#pass=code_weights&node=linear") as page:
        assert page.locator("#spreads svg").count() == 2
        assert page.locator("#spreads svg .mark").count() == 4 and page.locator("#spreads svg .outline").count() == 6
        assert "alone it leaves 10.0 dB at the outputs (75 % of all)" in page.locator("#story").inner_text()
        page.goto(report.as_uri() + "#pass=code_weights&node=relu")
        assert page.locator("#spreads svg").count() == 0


def test_on_paper_everything_is_open_and_nothing_is_cut_off(browser: Any, report: Path) -> None:
    with Opened(browser, report) as page:
        assert page.locator("details:not([open])").count() > 0
        page.emulate_media(media="print")
        page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
        assert page.locator("details:not([open])").count() == 0
        assert page.locator("nav").is_hidden() and page.locator("#pass-diff").is_visible()
        assert len(page.pdf()) > 10_000


def test_everything_that_can_be_used_or_seen_has_a_name(browser: Any, report: Path) -> None:
    with Opened(browser, report, "#pass=code_weights&node=linear") as page:
        for role in ("button", "link", "checkbox", "searchbox", "combobox", "img", "region", "navigation"):
            for each in page.get_by_role(role).all():
                assert page.evaluate(_NAMED, each.element_handle()), (role, each.evaluate("e => e.outerHTML")[:200])


def test_search_finds_and_opens(browser: Any, report: Path) -> None:
    with Opened(browser, report) as page:
        page.keyboard.press("/")
        page.keyboard.type("first.w")
        names = page.locator("#search-results a").all_inner_texts()
        assert "first.weight" in names
        page.keyboard.press("Enter")
        page.wait_for_selector("#place:not([hidden])")
        assert page.locator("#place-title").inner_text().startswith("first.weight")
        page.locator("#search").fill("no such place")
        assert page.locator("#search-count").inner_text() == "0 places"


def test_unchanged_lines_are_folded_and_unfold(browser: Any, tmp_path: Path) -> None:
    trace = made_up(60, 1)
    with Opened(browser, saved(trace, tmp_path / "report.html")) as page:
        folds = page.locator("#pass-diff .fold")
        before, rows = folds.count(), page.locator("#pass-diff tr").count()
        assert before > 0 and rows < 60
        folds.first.get_by_role("button").click()
        assert folds.count() == before - 1 and page.locator("#pass-diff tr").count() > rows
        # What is shown, folded or not, is both programs.
        while folds.count():
            folds.first.get_by_role("button").click()
        for column, record in enumerate(trace):
            cells = page.locator(f"#pass-diff tbody td:nth-child({column + 1})").all_inner_texts()
            shown = [cell.strip() for cell in cells if cell.strip()]
            assert shown == [line.strip() for line in record.text.splitlines()]


def test_large_programs_are_paged(browser: Any, tmp_path: Path) -> None:
    path = saved(made_up(50_000, 1), tmp_path / "report.html")
    with Opened(browser, path, "#pass=pass_0") as page:
        assert page.locator("#pass-diff tr").count() < 1200
        rows = page.locator("#pass-diff tr").count()
        page.locator("#more").click()
        assert page.locator("#pass-diff tr").count() > rows
        page.goto(path.as_uri() + "#pass=capture&node=node_2500")
        assert "node_2500" in page.locator("#pass-diff [aria-current]").inner_text()


def test_both_colour_schemes_and_a_narrow_window(browser: Any, report: Path) -> None:
    grounds = []
    for scheme in ("light", "dark"):
        with Opened(browser, report, color_scheme=scheme) as page:
            grounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
            page.set_viewport_size({"width": 360, "height": 700})
            assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert grounds[0] != grounds[1]
