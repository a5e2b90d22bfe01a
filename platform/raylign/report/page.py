"""The report of a run as one HTML file that needs nothing else, and its description for MLflow as Markdown.

Text of models, prompts and servers is untrusted: it is escaped, its control characters are written out, and the page
lets a browser load and run nothing.
"""

import base64
import html
import time
from collections.abc import Iterable, Sequence

from raylign.config import EvaluateConfig
from raylign.records import RoundReport
from raylign.report.figures import Picture
from raylign.report.measures import measured, shown, written
from raylign.report.record import Answer, Incident, RunRecord
from raylign.report.tables import step_mean
from raylign.report.text import escape_control, inline
from raylign.report.verdict import Verdict
from raylign.report.win_rates import INDENT, win_rate_rows

SAMPLES = 12
"""Prompts whose answers a report shows."""
_INCIDENTS = 50
_LONGEST_TEXT = 4000
_LONGEST_NOTE = 7500
"""Characters of a description; MLflow takes 8,000."""
_ROUNDS_IN_NOTE = 16
_TRAINING = {"rewards/accuracies": ".2f", "rewards/margins": "z.3f", "loss": ".3f"}
_SPACE = "\u00a0"
_NOT_IN_NOTE = frozenset(
    ("preferences", "rewards/accuracies", "rewards/margins", "loss", "seconds", "entropy, nats a token", "distinct-2")
    + ("EOS rate", "win rate at equal lengths", "wins %", "ties %", "losses %")
)
"""Columns of the report that the description goes without: it is cut where it is wider than the window."""
_STATUS = {"SCHEDULED": "waiting for answers of people"}
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:0 auto;max-width:76rem;padding:1rem 1.5rem;color:#1c1c1c;background:#fff}
h1{margin:.2em 0}h2{margin:1.8em 0 .5em;border-bottom:1px solid #ddd}
.verdict{font-size:1.15rem;padding:.7em 1em;border-left:6px solid #777;background:#f5f5f5}
.better{border-color:#2a8f4d}.worse{border-color:#c0392b}.unclear{border-color:#d9a30d}
.wide{overflow-x:auto}table{border-collapse:collapse}th,td{padding:.35em .5em;border-bottom:1px solid #e3e3e3}
th{text-align:left;font-weight:600}td.number,th.number{text-align:right;vertical-align:top}td.number{white-space:nowrap}th:first-child,td:first-child{text-align:left}
.figures{display:flex;flex-wrap:wrap;gap:1.5rem}figure{margin:0;flex:1 1 28rem;max-width:40rem;min-width:0}
figure img{max-width:100%;height:auto}figcaption{font-weight:600}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:1rem}.pair>div{min-width:0}
.text,pre{white-space:pre-wrap;overflow-wrap:anywhere;background:#f7f7f7;padding:.6em .8em;margin:.3em 0}
.prompt{font-weight:600;white-space:pre-wrap;overflow-wrap:anywhere}.small{color:#555;font-size:.9rem}
@media(max-width:44rem){.pair{grid-template-columns:1fr}}
"""


def report_page(record: RunRecord, found: Verdict, drawn: Sequence[Picture]) -> str:
    """The whole page."""
    name = _shown(record.config.run.name)
    figures = "".join(
        f'<figure><figcaption>{_shown(one.title)}</figcaption><img alt="{_shown(one.title)}" '
        f'src="data:image/png;base64,{base64.b64encode(one.png).decode()}"></figure>'
        for one in drawn
    )
    notes = "".join(f"<li>{_shown(note)}</li>" for note in (*found.notes, *found.outcomes))
    what = " · ".join(f"{_shown(key)} <strong>{_shown(value)}</strong>" for key, value in record.what.items())
    parts = [
        f"<h1>{name}</h1><p>{what}</p>",
        f'<p class="verdict {found.word}">{_shown(found.sentence)}</p>',
        f"<ul>{notes}</ul>" if notes else "",
        _section("Rounds" if record.comparison is None else "Win rates", _html_table(*results(record))),
        _section("Figures", f'<div class="figures">{figures}</div>' if figures else ""),
        _section(f"Held-out answers {' and '.join(_whose(record))}", _html_samples(record)),
        _section("Incidents", _html_incidents(record.incidents)),
        _section("Commands", f"<pre>{_shown(chr(10).join(record.commands.values()))}</pre>"),
        f'<p class="small">{_shown(str(record.path))}</p>',
    ]
    body = "\n".join(filter(None, parts))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" '
        f'content="{_POLICY}"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{name}</title><style>{_STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def results(record: RunRecord) -> tuple[list[str], list[list[str]]]:
    """The table of rounds, or of win rates: its head and rows."""
    if record.comparison is None:
        return rounds_rows(record)
    head, rows = win_rate_rows(record.comparison)
    flat = [name.replace("\n", " ") for name in head]
    return flat, [[name.replace(INDENT, "· "), *cells] for name, *cells in rows]


def rounds_rows(record: RunRecord) -> tuple[list[str], list[list[str]]]:
    """The table of rounds: its head, and a row for each evaluation."""
    if not record.evaluations:
        return [], []
    measures = shown([evaluation for _, evaluation in record.evaluations])
    reports = {report.index: report for report in record.reports}
    training = {name: form for name, form in _TRAINING.items() if any(_mean(r, name) != "-" for r in reports.values())}
    head = ["round", *(measure.title for measure in measures), "preferences", *training, "seconds"]
    rows = []
    for index, evaluation in record.evaluations:
        values, report = measured(evaluation), reports.get(index)
        cells = [str(index), *(written(measure, values) for measure in measures)]
        if report is None:
            rows.append(cells + ["-"] * (2 + len(training)))
            continue
        cells += [
            str(report.counts.get("preferences", "-")),
            *(_mean(report, name, form) for name, form in training.items()),
        ]
        rows.append([*cells, f"{sum(report.seconds.values()):.0f}"])
    return head, rows


def _mean(report: RoundReport, name: str, form: str = "g") -> str:
    value = step_mean(report, name)
    return "-" if value is None else format(value, form)


def description(record: RunRecord, found: Verdict, status: str, picture: str | None) -> str:
    """What stands on the run's page in MLflow; `picture` is the address of the first figure there."""
    head, rows = _narrow(*results(record))
    done = (
        "" if isinstance(record.config, EvaluateConfig) else f"{len(record.reports)} of {record.config.rounds} rounds, "
    )
    left_out = rows[1 : len(rows) - _ROUNDS_IN_NOTE + 1] if len(rows) > _ROUNDS_IN_NOTE else []
    rows = [row for row in rows if row not in left_out]
    table = [_cells(head), _cells(["---"] * len(head)), *map(_cells, rows)] if rows else []
    lines = [
        f"**{inline(found.sentence)}**",
        " · ".join(f"{key} **{inline(value)}**" for key, value in record.what.items()),
        f"{done}{_STATUS.get(status, status.lower())}.",
        "\n".join(f"- {inline(note)}" for note in (*found.notes, *found.outcomes)),
        "\n".join(table) + (f"\n\n{len(left_out)} earlier rounds are in report.html." if left_out else ""),
        ""
        if picture is None
        else f"With {record.config.confidence:.0%} intervals, over held-out prompts or rows:\n\n![figure]({picture})",
        f"Figures, and report.html with answers {inline(' and '.join(_whose(record)))}, are under Artifacts.",
        "\n".join(f"- {_code(command)}" for command in record.commands.values()),
    ]
    text = "\n\n".join(filter(None, lines))
    return text if len(text) <= _LONGEST_NOTE else f"{text[:_LONGEST_NOTE]}…"


def _narrow(head: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """The first two columns, and of the others what the description has room for."""
    kept = [place for place, name in enumerate(head) if place < 2 or name not in _NOT_IN_NOTE]
    return [head[place] for place in kept], [[row[place] for place in kept] for row in rows]


def _cells(row: Iterable[str]) -> str:
    """MLflow's tables have no room between columns and break intervals: spaces that do not break do both."""
    cells = (cell if cell == "---" else f"{_whole_intervals(inline(cell))}{_SPACE * 2}" for cell in row)
    return f"| {' | '.join(cells)} |"


def _whole_intervals(cell: str) -> str:
    return cell.replace(", ", f",{_SPACE}")


def _code(command: str) -> str:
    """Markdown of a command that may be broken into lines, as no block of code is; two backticks hold single ones."""
    text = escape_control(command)
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def _shown(text: str) -> str:
    left_out = len(text) - _LONGEST_TEXT
    ending = f" ... ({left_out} more characters)" if left_out > 0 else ""
    return html.escape(escape_control(text[:_LONGEST_TEXT], keep="\n\t") + ending)


def _section(title: str, body: str) -> str:
    return f"<h2>{_shown(title)}</h2>\n{body}" if body else ""


def _html_table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "number") -> str:
    if not rows:
        return ""
    top = "".join(f'<th class="{kind}">{_head(cell)}</th>' for cell in head)
    body = "".join(f"<tr>{''.join(f'<td class={kind}>{_cell(cell, kind)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _whose(record: RunRecord) -> tuple[str, str]:
    """Of which policy the answers are that stand beside each other."""
    return (
        ("before", "after")
        if record.comparison is None
        else (f"of {next(iter(record.comparison.opponents))}", "of the policy")
    )


def _head(title: str) -> str:
    """May be broken behind a slash, not at a hyphen."""
    return _shown(title).replace("/", "/<wbr>").replace("-", "&#8209;")


def _cell(text: str, kind: str) -> str:
    """An interval stands below its value: many measures fit a window."""
    value, bracket, interval = text.partition(" [") if kind == "number" else (text, "", "")
    return _shown(value) + (f'<div class="small">[{_shown(interval)}</div>' if bracket else "")


def _html_samples(record: RunRecord) -> str:
    """The first answer to each of the first prompts, in the order of the data: nobody has picked them."""
    first, last, whose = _firsts(record.before), _firsts(record.after), _whose(record)
    both = [(answer, last[prompt]) for prompt, answer in first.items() if prompt in last]
    shown_pairs = "".join(
        f'<p class="prompt">{_shown(one.prompt)}</p><div class="pair">'
        f"{_html_answer(whose[0], one)}{_html_answer(whose[1], other)}</div>"
        for one, other in both[:SAMPLES]
    )
    if not shown_pairs:
        return ""
    told = f"The first {min(SAMPLES, len(both))} of {len(both)} held-out prompts, in the order of the data."
    return f'<p class="small">{told}</p>{shown_pairs}'


def _firsts(answers: Iterable[Answer]) -> dict[str, Answer]:
    found: dict[str, Answer] = {}
    for answer in answers:
        found.setdefault(answer.prompt_id, answer)
    return found


def _html_answer(when: str, answer: Answer) -> str:
    score = f"no score ({_shown(answer.reason)})" if answer.score is None else f"score {answer.score:z.3f}"
    return f'<div><span class="small">{_shown(when)}, {score}</span><div class="text">{_shown(answer.text)}</div></div>'


def _html_incidents(incidents: Sequence[Incident]) -> str:
    if not incidents:
        return "<p>None: no actor was lost.</p>"
    rows = [
        [
            time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(one.time)).replace(" ", _SPACE),
            str(one.round),
            one.role,
            one.happened,
            one.detail,
        ]
        for one in incidents[-_INCIDENTS:]
    ]
    told = f"<p>The last {len(rows)} of {len(incidents)}.</p>" if len(rows) < len(incidents) else ""
    return told + _html_table([f"time{_SPACE}(UTC)", "round", "role", "what", "detail"], rows, "words")
