"""`summary.md`: what the rows say, for a reader who has one minute."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.gpu_suite.plan import PARTS, Part
from benchmarks.gpu_suite.predictions import compared
from benchmarks.gpu_suite.records import Row
from benchmarks.gpu_suite.supervisor import SKIPPED, failures

FRAME = ("part", "case", "card", "at_s", "seconds", "failure", "text")
"""Keys that every row may have, beside what was measured."""

HIDDEN = {*FRAME, "grid", "heads", "kind", "sparsity", "tiles_per_list", "tile", "tokens", "name", "config_digest"}
"""Keys that tables leave out: the case's name says them, or nobody reads them there."""

MOST_KEYS, MOST_CELL, MOST_TEXT = 12, 60, 1200


def summary(rows: Sequence[Row], parts: Sequence[Part] = PARTS, ended: str = "", rehearse: bool = False) -> str:
    """Return the whole text. `ended` says how the suite ended, if it was not by itself."""
    blocks = [_head(rows, ended), _failures(rows), "" if rehearse else _predictions(rows), _durations(rows, parts)]
    blocks += [_part(part, rows) for part in parts if any(_measured(rows, part))]
    return "\n\n".join(filter(None, blocks)) + "\n"


def _head(rows: Sequence[Row], ended: str) -> str:
    versions: Row = next((row for row in rows if row["case"] == "versions" and "torch" in row), {})
    facts = [
        f"{key} {versions[key]}" for key in ("date", "commit", "python", "torch", "triton", "cuda") if versions.get(key)
    ]
    card = rows[-1]["card"] if rows else "nothing has run"
    return "\n".join(filter(None, [f"# GPU suite on {card}", " · ".join(facts), ended and f"**{ended}**"]))


def _failures(rows: Sequence[Row]) -> str:
    failed = [row for row in failures(rows) if row["failure"] != SKIPPED]
    skipped = [row for row in failures(rows) if row["failure"] == SKIPPED]
    lines = [f"## Failures: {len(failed)}"]
    for row in failed:
        text = row.get("text", "").strip()
        lines.append(f"- **{row['part']}: {row.get('test', row['case'])}**: {row['failure']}")
        lines.append("\n".join(["```", text[-MOST_TEXT:], "```"]) if text else "")
    lines += [f"- not reached: {row['part']}: {row['case']} ({row['text']})" for row in skipped]
    return "\n".join(filter(None, lines))


def _predictions(rows: Sequence[Row]) -> str:
    known = [(prediction, value) for prediction, value in compared(rows) if value is not None]
    if not known:
        return ""
    lines = ["## Predictions", "", "| case | number | predicted | measured | |", "|---|---|---|---|---|"]
    for prediction, value in known:
        verdict = "held" if prediction.low <= value <= prediction.high else "**wrong**"
        lines.append(f"| {prediction.case} | {prediction.key} | {prediction.range} | {_cell(value)} | {verdict} |")
    return "\n".join(lines)


def _durations(rows: Sequence[Row], parts: Sequence[Part]) -> str:
    lines = ["## Seconds", "", "| part | estimated | took |", "|---|---|---|"]
    took = {row["part"]: row["seconds"] for row in rows if row["case"] == "part" and "seconds" in row}
    lines += [f"| {part.name} | {part.estimate_s:g} | {took.get(part.name, '-')} |" for part in parts]
    lines.append(f"| all | {sum(part.estimate_s for part in parts):g} | {round(sum(took.values()), 1)} |")
    return "\n".join(lines)


def _measured(rows: Sequence[Row], part: Part) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield case and numbers of the part's rows that have some to show."""
    for row in rows:
        shown = {key: value for key, value in row.items() if key not in HIDDEN and not isinstance(value, dict | list)}
        if row["part"] == part.name and shown:
            yield row["case"], dict(list(shown.items())[:MOST_KEYS])


def _part(part: Part, rows: Sequence[Row]) -> str:
    """One table per set of keys, each in the order of its rows."""
    tables: dict[tuple[str, ...], list[str]] = {}
    for case, shown in _measured(rows, part):
        lines = tables.setdefault(tuple(shown), [])
        lines.append(f"| {case} | {' | '.join(map(_cell, shown.values()))} |")
    blocks = [f"## {part.name}"]
    for keys, lines in tables.items():
        head = f"| case | {' | '.join(keys)} |\n" + "|---" * (len(keys) + 1) + "|"
        blocks.append("\n".join([head, *lines]))
    return "\n\n".join(blocks)


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "/")[:MOST_CELL]
