"""The report of a run: one file that needs nothing else, in which text of models is text."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from raylign.errors import RecordError
from raylign.records import HeldOutEvaluation
from raylign.report.figures import Picture, pictures
from raylign.report.measures import measured
from raylign.report.page import SAMPLES, description, report_page
from raylign.report.record import read_run
from raylign.report.verdict import verdict
from raylign.review.record import ReviewRecord, pair_of
from raylign.tracking.presented import round_note
from recipes.commands.review import show_run
from tests.unit.report.run_records import BASELINE, save_run
from tests.unit.report.test_inert_output import CONTROL, HOSTILE, Page

GAINS = [0.1 + 0.01 * (i % 3) for i in range(20)]
PNG = b"\x89PNG\r\n\x1a\n"
OURS = {
    *("html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "strong", "ul", "li", "div", "span", "pre"),
    *("figure", "figcaption", "img", "wbr", "table", "thead", "tbody", "tr", "th", "td"),
}


def page_of(parent: Path, text: str) -> str:
    record = read_run(save_run(parent, GAINS, text=text))
    return report_page(record, verdict(record), (Picture("score", "Score", PNG),))


@pytest.mark.parametrize("text", [*HOSTILE, "</script><img onerror=alert(1)>", "</pre></div></html><script src=//x>"])
def test_hostile_answers_are_text_and_bring_no_element(tmp_path: Path, text: str) -> None:
    page = Page(page_of(tmp_path, text))
    assert page.elements <= OURS and page.others == []
    assert not {name for _, name, _ in page.attributes if name.startswith("on")}
    sources = [value for _, name, value in page.attributes if name in ("src", "href", "action")]
    assert all(value and value.startswith("data:image/png;base64,") for value in sources) and sources


def test_the_page_forbids_scripts_and_every_request(tmp_path: Path) -> None:
    text = page_of(tmp_path, "an answer")
    assert 'http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; style-src' in text
    assert not re.search(r"(src|href)=.?(https?:)?//", text)


def test_control_characters_are_written_out(tmp_path: Path) -> None:
    text = page_of(tmp_path, CONTROL)
    assert not set(text) & set("\x1b\x07\x9b\u202e")
    assert "\\x1b]0;title" in text and "\\u202e" in text


def test_a_page_has_verdict_rounds_samples_incidents_and_commands(tmp_path: Path) -> None:
    text = page_of(tmp_path, "an answer")
    assert 'class="verdict better">Better: held-out score went from' in text
    assert '<td class=number>0.600<div class="small">[0.500, 0.700]</div></td>' in text
    assert text.count(", score ") == 2 * SAMPLES
    assert "an answer after" in text
    assert f"The first {SAMPLES} of 20 held-out prompts" in text
    assert "why: an answer" in text
    assert f"raylign export {tmp_path / 'demo'} --to exported" in text


def test_every_figure_is_drawn_and_those_without_anything_to_show_are_not(tmp_path: Path) -> None:
    drawn = pictures(read_run(save_run(tmp_path, GAINS)))
    assert [one.name for one in drawn] == ["score", "frontier", "margins", "yield", "seconds"], "nothing was stale"
    assert all(one.png.startswith(PNG) for one in drawn)


def test_a_description_is_markdown_within_mlflows_limit(tmp_path: Path) -> None:
    record = read_run(save_run(tmp_path, GAINS))
    text = description(record, verdict(record), "RUNNING", "get-artifact?path=figures/score.png&run_uuid=1")
    assert "**Better: held-out score went from 0.200 \\[0.100, 0.300\\]" in text
    assert "2 of 3 rounds, running." in text
    assert "2 of 3 rounds, waiting for answers of people." in description(record, verdict(record), "SCHEDULED", None)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 5 and len({row.count("|") - row.count("\\|") for row in rows}) == 1
    assert "\u00a00.300\\]" in rows[2] and "0.200 \\[" in rows[2], (
        "a narrow page may break before an interval, not in it"
    )
    assert max(map(len, rows)) < 120
    assert "over held-out prompts or rows:\n\n![figure](get-artifact?path=figures/score.png&run_uuid=1)" in text
    assert f"raylign resume {tmp_path / 'demo'}" in text
    assert len(text) < 8000


def test_the_run_of_a_round_says_which_and_what_came_of_it() -> None:
    assert round_note(3, "a*b").startswith("Round 3, not finished. ") and "the run a\\*b." in round_note(3, "a*b")
    told = round_note(3, "demo", measured(replace(BASELINE, kl=2.5)))
    assert told.startswith("Round 3, held out: score: 0.200 \\[0.100, 0.300\\]; KL, nats: 2.50")
    rows = HeldOutEvaluation("rewards/accuracies", 0.6, 0.5, 0.7, 40, {"loss": 0.61})
    assert "loss: 0.610" in round_note(1, "demo", measured(rows))


def test_markdown_of_a_name_is_text(tmp_path: Path) -> None:
    record = read_run(save_run(tmp_path, GAINS))
    hostile = record.config.model_copy(
        update={"model": record.config.model.model_copy(update={"path": "a`|<img src=x onerror=y>[b](c)*"})}
    )
    own = type(record)(
        record.path, hostile, record.baseline, record.reports, record.before, record.after, record.lags, ()
    )
    first = description(own, verdict(own), "RUNNING", None).split("\n\n")[1]
    assert "\\`\\|&lt;img src=x onerror=y&gt;\\[b\\](c)\\*" in first


def test_show_prints_the_verdict_and_writes_the_report(tmp_path: Path) -> None:
    directory = save_run(tmp_path, GAINS)
    console = Console(record=True, width=160)
    file = show_run(directory.path, None, console)
    text = console.export_text()
    assert text.startswith("Better: held-out score went from")
    assert "rewards/" in text and f"report:  {file}" in text and "raylign resume" in text
    assert file == directory.path / "report.html"
    assert file.read_text().count("data:image/png;base64,") == 5
    about = ("p1", ({"role": "user", "content": "Why?"},))
    ReviewRecord(directory.path).add([pair_of("run", 3, about, ("this", "that"), by="scoring", seed=0)])
    elsewhere = show_run(directory.path, tmp_path / "a" / "b.html", console)
    assert elsewhere.is_file()
    assert "\nwaiting for people, open questions: 1; once" in console.export_text()


def test_damaged_answers_are_an_error_that_names_the_file(tmp_path: Path) -> None:
    directory = save_run(tmp_path, GAINS)
    path = directory.round(2) / "samples.parquet"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(RecordError, match=r"0002/samples\.parquet"):
        read_run(directory)
