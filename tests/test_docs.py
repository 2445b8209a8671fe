"""Every ```python snippet of the documentation runs, each in a process and a folder of its own.

In the Markdown, a comment on the line before a snippet changes that:

    <!-- not run: reason -->    skipped, with that reason
    <!-- continues -->          runs after the snippet before it (and what that continues), in one process

and one behind it says what it must print, a snippet that continues others only its own part:

    <!-- prints -->             the block that follows is its output
"""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [path for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md") if path.exists()]
DOCUMENTS += sorted((ROOT / "docs").glob("**/*.md"))

_OPENING = re.compile(r"^( *)```python\s*$")
_NOT_RUN = re.compile(r"<!--\s*not run:\s*(.+?)\s*-->")
_CONTINUES = re.compile(r"<!--\s*continues\s*-->")
_PRINTS = re.compile(r"<!--\s*prints\s*-->")


@dataclass(frozen=True)
class Snippet:
    """`source` has the document's line numbers, blank lines standing before it; `line` is its first.

    `prints` is what the end of its output must be, None where nothing is said of it.
    """

    path: Path
    line: int
    source: str
    not_run: str | None = None
    prints: str | None = None

    def __str__(self) -> str:
        return f"{self.path.name}:{self.line}"


def snippets(path: Path) -> list[Snippet]:
    """The document's Python snippets. Raises ValueError where one is not closed."""
    lines = path.read_text().splitlines()
    found: list[Snippet] = []
    number = 0
    while number < len(lines):
        opening = _OPENING.match(lines[number])
        number += 1
        if not opening:
            continue
        start = number
        indent, fence = len(opening[1]), f"{opening[1]}```"
        while number < len(lines) and lines[number].rstrip() != fence:
            number += 1
        if number == len(lines):
            raise ValueError(f"{path.name}:{start}: the snippet is not closed")
        comment = next((line for line in reversed(lines[: start - 1]) if line.strip()), "")
        continues = bool(_CONTINUES.search(comment))
        if continues and not found:
            raise ValueError(f"{path.name}:{start}: there is no snippet to continue")
        before = found[-1].source.split("\n") if continues else []
        body = [line[indent:] for line in lines[start:number]]
        source = "\n".join([*before, *[""] * (start - len(before)), *body])
        reason = _NOT_RUN.search(comment)
        found.append(Snippet(path, start + 1, source, reason[1] if reason else None, _printed(path, lines, number + 1)))
    return found


def _printed(path: Path, lines: list[str], number: int) -> str | None:
    """Return the block that a comment at or behind a line says is printed."""
    rest = iter(lines[number:])
    if not _PRINTS.search(next((line for line in rest if line.strip()), "")):
        return None
    if next(rest, "") != "```":
        raise ValueError(f"{path.name}:{number + 1}: no block says what is printed")
    block = []
    for line in rest:
        if line == "```":
            return "\n".join(block)
        block.append(line)
    raise ValueError(f"{path.name}:{number + 1}: the block of what is printed is not closed")


def run(snippet: Snippet, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the snippet as a script in `folder`; its traceback shows the document's line numbers."""
    script = folder / f"from_{snippet.path.stem}.py"  # a page may have the name of a module
    script.write_text(snippet.source + "\n")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, script.name]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize("snippet", [s for path in DOCUMENTS for s in snippets(path)], ids=str)
def test_snippet_runs(snippet: Snippet, tmp_path: Path) -> None:
    if snippet.not_run:
        pytest.skip(snippet.not_run)
    done = run(snippet, tmp_path)
    assert done.returncode == 0, f"{snippet}\n{done.stdout}\n{done.stderr}"
    if snippet.prints is not None:
        expected = snippet.prints.splitlines()
        assert done.stdout.splitlines()[-len(expected) :] == expected


SAMPLE = """\
# Title
```python
x = 1
```
<!-- continues -->
```python
assert x == 1
```

  ```python
  open("written", "w").close()
  ```

<!-- not run: needs a GPU -->

```python
raise SystemExit("not to be run")
```
```bash
exit 1
```
```python
undefined
```
```python
print("first")
print("a", "b")
```

<!-- prints -->
```
a b
```
"""


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    path = tmp_path / "sample.md"
    path.write_text(SAMPLE)
    return path


def test_snippets_are_found_where_they_stand(sample: Path) -> None:
    found = snippets(sample)
    assert [snippet.line for snippet in found] == [3, 7, 11, 17, 23, 26]
    assert [snippet.not_run for snippet in found] == [None, None, None, "needs a GPU", None, None]
    assert [snippet.prints for snippet in found] == [*[None] * 5, "a b"]
    for snippet in found:
        assert snippet.source.split("\n")[snippet.line - 1] == SAMPLE.split("\n")[snippet.line - 1].strip()


def test_good_snippets_pass_and_a_bad_one_fails_at_its_line(sample: Path, tmp_path: Path) -> None:
    first, continued, writing, _, bad, printing = snippets(sample)
    for good in (first, continued, writing, printing):
        done = run(good, tmp_path)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "written").exists()
    failed = run(bad, tmp_path)
    assert failed.returncode != 0
    assert 'from_sample.py", line 23' in failed.stderr
    assert "NameError" in failed.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```python\nx = 1\n", "bad.md:1: the snippet is not closed"),
        ("<!-- continues -->\n```python\n```\n", "bad.md:2: there is no snippet to continue"),
        ("```python\n```\n<!-- prints -->\ntext\n", "bad.md:3: no block says what is printed"),
        ("```python\n```\n\n<!-- prints -->\n```\ntext\n", "bad.md:3: the block of what is printed is not closed"),
    ],
)
def test_a_malformed_document_is_an_error(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.md").write_text(text)
    with pytest.raises(ValueError, match=message):
        snippets(tmp_path / "bad.md")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere_and_nothing_is_left_to_fill_in(path: Path) -> None:
    text = path.read_text()
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text)]
    dead = [target for target in targets if target and "://" not in target and not (path.parent / target).exists()]
    assert not dead
    assert "@@" not in re.sub(r"^@@ .* @@", "", text, flags=re.M), "hunks of a diff aside"


def test_the_picture_of_spaces_is_what_the_analysis_finds() -> None:
    draw = runpy.run_path(str(ROOT / "tools" / "draw_spaces.py"))
    drawn = draw["picture_of_the_document"]()
    assert drawn == (ROOT / "docs" / "pictures" / "spaces.svg").read_text(), "run tools/draw_spaces.py"
