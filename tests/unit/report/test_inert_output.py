"""Model output is text and nothing else, in every page, on the terminal and in the model card."""

import io
import json
import logging
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from rich.console import Console

from raylign.config.blocks import ModelBlock
from raylign.export.card import Method, PolicyFacts, card_text
from raylign.records import Evaluation, Prompt, Score
from raylign.report.console import PlainLines
from raylign.report.tables import Sample, samples_block
from raylign.tracking.artifacts import table_page
from tests.faults import record

HOSTILE = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "</td></tr></table><iframe src='javascript:alert(1)'></iframe>",
    "</title></style><svg onload=alert(1)>",
    '" onmouseover="alert(1)',
    "' autofocus onfocus='alert(1)",
    "<!-- <b>",
    "<![CDATA[<b>x</b>]]>",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "<a href=javascript:alert(1)>x</a>",
    "<\x00script>alert(1)</script>",
    "{{constructor.constructor('alert(1)')()}}",
    "<base href=//evil.example>",
    "<meta http-equiv=refresh content=0;url=//evil.example>",
)
OURS = {
    *("html", "head", "meta", "title", "style", "body", "h1", "p"),
    *("table", "thead", "tbody", "tr", "th", "td"),
}
ATTRIBUTES = {("html", "lang", "en"), ("meta", "charset", "utf-8")}
CONTROL = "\x1b]0;title\x07\x1b[2J\x1b]8;;http://evil.example\x1b\\link\x1b]8;;\x1b\\\r\x9b31m\u202egnp.exe"
MARKUP = "[bold]x[/bold] [link=http://evil.example]y[/link] :smile: [/]"


class Page(HTMLParser):
    """Elements, attributes and the texts of cells, as a browser would find them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: set[str] = set()
        self.attributes: set[tuple[str, str, str | None]] = set()
        self.others: list[str] = []
        self.cells: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.add(tag)
        self.attributes |= {(tag, name, value) for name, value in attrs}
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        if self.cells:
            self.cells[-1] += data

    def handle_comment(self, data: str) -> None:
        self.others.append(data)

    def unknown_decl(self, data: str) -> None:
        self.others.append(data)


def rows() -> list[dict[str, Any]]:
    """Hostile text as a value, inside a list and a mapping, and as the name of a column."""
    return [{"text": text, "nested": [{text: text}], text: text} for text in HOSTILE]


def save(path: Path, table: list[dict[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(f"{json.dumps(row)}\n" for row in table))
        return path
    for row in table:
        row["nested"] = json.dumps(row["nested"])
    columns = list(dict.fromkeys(name for row in table for name in row))
    pq.write_table(pa.table({name: [row.get(name) for row in table] for name in columns}), path)
    return path


@pytest.mark.fault
@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_a_page_has_no_element_or_attribute_but_ours(suffix: str, tmp_path: Path) -> None:
    page = Page(table_page(save(tmp_path / f"<img src=x onerror=alert(1)>{suffix}", rows())))
    assert page.elements <= OURS
    assert page.attributes <= ATTRIBUTES
    assert page.others == []
    for text in HOSTILE:
        assert text in [cell.strip() for cell in page.cells], "shown as it was written"
    record("HTML in model output", f"{len(HOSTILE)} kinds as values and columns of a {suffix} table", lost="nothing")


def test_the_parser_would_have_found_them() -> None:
    page = Page("".join(f"<p>{text}</p>" for text in HOSTILE) + "".join(f'<p title="{text}">' for text in HOSTILE))
    assert {"script", "img", "iframe", "svg", "a", "base", "meta"} <= page.elements
    assert ("p", "onmouseover", "alert(1)") in page.attributes and page.others


def shown(completion: str, reason: str) -> str:
    """What a terminal with colours gets of a sample before and after."""
    prompt = Prompt("p000001", ({"role": "user", "content": completion},), (1,))
    sample = Sample(prompt, completion, Score(None, reason=reason))
    console = Console(file=(out := io.StringIO()), force_terminal=True, color_system="truecolor", width=400)
    console.print(samples_block("t", [sample], [sample]))
    return out.getvalue()


@pytest.mark.fault
def test_a_terminal_shows_model_output_letter_by_letter() -> None:
    text = shown(MARKUP + CONTROL, reason=MARKUP + CONTROL)
    assert text.count(MARKUP) == 5, "prompt, two completions and two reasons"
    own = text.replace("\x1b[1m", "").replace("\x1b[0m", "").replace("\x1b[92m", "")
    assert not set(own) & {"\x1b", "\x07", "\r", "\x9b", "\u202e"}
    assert r"\x1b]8;;http://evil.example\x1b\link" in own and r"\u202egnp.exe" in own
    record("terminal controls in model output", "OSC, CSI, bidi and markup in text and reason", lost="nothing")


def test_log_lines_cannot_steer_the_terminal_or_show_credentials() -> None:
    line = logging.LogRecord("x", logging.WARNING, "", 0, "%s at http://me:hush@host", (CONTROL,), None)
    text = PlainLines("%(message)s").format(line)
    assert not set(text) & {"\x1b", "\x07", "\r", "\x9b"} and text.endswith(" at http://host")


EVALUATION = Evaluation(0.5, 0.4, 0.6, 2.0, 8.0, 0.5, 1.0, 3, 0)


@pytest.mark.parametrize(
    "text", [*HOSTILE, "a`b|c", "a\n# heading\n<b>", "---\nlicense: mit", '"); import os; os.system("x']
)
def test_names_in_the_card_are_code_spans(text: str) -> None:
    method = Method("DPO", "DPO, loss `sigmoid`", ("dpo",), {"Prompts": text, "Scorer": text})
    facts = PolicyFacts("tiny", text, text, method, 1, EVALUATION, 0.95, {})
    card = card_text(facts, is_adapter=True, in_4bit=ModelBlock(load_in_4bit=True))
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front).keys() == {"library_name", "pipeline_tag", "tags"}
    outside = "".join(part for part in body.split("```")[::2])
    plain = "".join(outside.split("`")[::2])
    assert "<" not in plain and "heading" not in plain and outside.count("`") % 2 == 0
    (table,) = [block for block in body.split("\n\n") if block.startswith("| | |")]
    assert len(table.splitlines()) == 7 and all(line.count("|") == 3 for line in table.splitlines())
    snippet = body.split("```python\n")[1].split("```")[0]
    compile(snippet, "card", "exec")


def test_a_run_without_hostile_names_has_them_as_they_are() -> None:
    facts = PolicyFacts("tiny", "org/model", "org/data", Method("DPO", "DPO", ("dpo",)), 1, EVALUATION, 0.95, {})
    assert "| Base model | `org/model` |" in card_text(facts, is_adapter=False)
