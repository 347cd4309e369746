"""What people and programs see: results for people on stderr, one JSON object for programs on stdout."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linearize_cli.terminal import clean, cleaned_console

if TYPE_CHECKING:
    from rich.console import Console

_PLAIN_WIDTH = 140
_WORD = 24
"""Longer words may be broken to keep a table."""
_SHARES = ("match", "explained")


def console() -> Console:
    """A rich console on stderr. Colours only on a terminal and without NO_COLOR; text is never read as markup."""
    width = None if sys.stderr.isatty() else _PLAIN_WIDTH
    return cleaned_console(stderr=True, markup=False, emoji=False, highlight=False, width=width)


def say(text: str) -> None:
    """One line for people, never wrapped."""
    print(clean(text), file=sys.stderr, flush=True)


def fail(text: str) -> None:
    """The one line of an error."""
    colour = sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    print("\x1b[1;31merror:\x1b[0m" if colour else "error:", clean(text), file=sys.stderr, flush=True)


def program() -> str:
    """How this program was called, to print commands that work when they are pasted back."""
    name = Path(sys.argv[0]).name
    return "linearize" if name.startswith("linearize") else f"{Path(sys.executable).name} -m linearize_cli"


def print_json(value: Any) -> None:
    """One JSON object on stdout; numbers that JSON does not have (nan, inf) become null."""
    print(json.dumps(_json_ready(value), indent=2, ensure_ascii=False, allow_nan=False), flush=True)


@contextlib.contextmanager
def only_json(wanted: bool) -> Iterator[None]:
    """With `wanted`, whatever the libraries print meanwhile goes to stderr, so that stdout holds the JSON alone."""
    if not wanted:
        yield
        return
    with contextlib.redirect_stdout(sys.stderr):
        yield


def print_report(title: str, report: Mapping[str, Any]) -> None:
    """A result for people: its figures as aligned lines, its lists of mappings as tables, in the order given."""
    target = console()
    if title:
        target.print(title, style="bold")
    _print_section(target, report, indent=0)


def print_table(rows: Sequence[Mapping[str, Any]], *, title: str | None = None, to: Console | None = None) -> None:
    """Rows with the same or nearly the same keys, one column a key; where they do not fit, one line a key."""
    from rich import box
    from rich.table import Table

    target = to or console()
    names = list(dict.fromkeys(name for row in rows for name in row))
    if title:
        target.print(title, style="italic", soft_wrap=True)
    if _least_width(names, rows) > target.width:
        return _print_records(names, rows, target)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in names:
        numeric = all(isinstance(row.get(name), (int, float, type(None))) for row in rows)
        table.add_column(label(name), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(figure(name, row.get(name)) for name in names))
    target.print(table)


def _least_width(names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> int:
    """Columns of a terminal in which a table still reads well: no ordinary word of it is broken."""
    cells = {name: [label(name), *(figure(name, row.get(name)) for row in rows)] for name in names}
    words = [max((len(word) for cell in column for word in cell.split()), default=0) for column in cells.values()]
    return sum(min(word, _WORD) for word in words) + 3 * len(names)


def _print_records(names: Sequence[str], rows: Sequence[Mapping[str, Any]], target: Console) -> None:
    first, *rest = names
    width = max((len(label(name)) for name in rest), default=0)
    for row in rows:
        target.print(f"{label(first)} {figure(first, row.get(first))}".strip(), style="bold")
        for name in rest:
            if row.get(name) is None:
                continue
            begin = f"  {label(name):{width}}  "
            room = max(target.width - len(begin), _WORD)
            for line in textwrap.wrap(figure(name, row[name]), room, break_on_hyphens=False) or [""]:
                target.print(begin + line, soft_wrap=True)
                begin = " " * len(begin)


@contextlib.contextmanager
def watching(*, doings: bool = True) -> Iterator[None]:
    """While it works, the library's doings: a line that goes away again on a terminal, else each said once.

    Warnings stay. Without `doings` there is nothing else, beside what draws or prints by itself.
    """
    from linearize.progress import told_to

    _warned.clear()
    if doings and drawable():
        with (
            console().status("loading") as status,
            told_to(lambda what, who: status.update(_plain(f"{what}: {who}")), _warn),
        ):
            yield
        return
    said: set[str] = set()

    def once(what: str, who: str) -> None:
        if doings and what not in said:
            said.add(what)
            say(what)

    with told_to(once, _warn):
        yield


def unsaid(notes: Iterable[str]) -> list[str]:
    """Those of a result's notes that were not said as warnings while it was made."""
    return [note for note in notes if note not in _warned]


_warned: set[str] = set()


def _warn(line: str) -> None:
    if line not in _warned:
        _warned.add(line)
        say(f"warning: {line}")


def _plain(text: str) -> Any:
    from rich.text import Text

    return Text(text)


def drawable() -> bool:
    """Whether stderr is a terminal that can be drawn on."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def _print_section(target: Console, values: Mapping[str, Any], *, indent: int, unit: str = "") -> None:
    plain = {name: value for name, value in values.items() if not _is_nested(value)}
    width = max((len(label(name)) for name in plain), default=0)
    for name, value in values.items():
        if name in plain:
            target.print(f"{'':{indent}}{label(name):{width}}  {figure(unit or name, value)}", soft_wrap=True)
        elif isinstance(value, Mapping) and _is_grid(value):
            rows = [{"": str(key), **row} for key, row in value.items()]
            print_table(rows, title=label(name), to=target)
        elif isinstance(value, Mapping):
            target.print(f"{'':{indent}}{label(name)}", style="bold")
            _print_section(target, value, indent=indent + 2, unit=name if _in_bytes(name) else "")
        else:
            print_table(value, title=label(name), to=target)


def _is_nested(value: Any) -> bool:
    if isinstance(value, Mapping):
        return bool(value)
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(item, Mapping) for item in value)


def _is_grid(value: Mapping[str, Any]) -> bool:
    """Whether a mapping of mappings reads better as a table: flat rows that share their keys."""
    rows = list(value.values())
    if len(rows) < 2 or not all(isinstance(row, Mapping) and row for row in rows):
        return False
    return all(row.keys() == rows[0].keys() and not any(map(_is_nested, row.values())) for row in rows)


def label(name: str) -> str:
    """What people read for a name of JSON."""
    # The figure beside it says its unit.
    return str(name).removesuffix("_bytes").replace("_", " ")


def figure(name: str, value: Any) -> str:
    """One value, readable: bytes in binary units, whole numbers in groups, floats with five digits."""
    if value is None:
        return "-"
    if isinstance(value, Mapping) and not value:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and _in_bytes(name):
        return human_bytes(value)
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float) and name.rsplit("_", 1)[-1] in _SHARES:
        return f"{value:.1%}".replace("%", " %")
    if isinstance(value, float) and name.rsplit("_", 1)[-1] == "seconds":
        return seconds(value)
    if isinstance(value, float):
        return f"{value:,.2f}" if 100 <= abs(value) < 1e9 else f"{value:.5g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(figure(name, item) for item in value) or "none"
    return " ".join("".join(c if c.isprintable() else " " for c in str(value)).split()) or "-"


def _in_bytes(name: str) -> bool:
    return "bytes" in name.split("_")


def plural(count: int, noun: str) -> str:
    """`1 step`, `2 steps`, `10,000 steps`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def seconds(value: float) -> str:
    """A duration: `0.0075 s`, `0.08 s`, `12.3 s`, `2:05`."""
    if not math.isfinite(value) or value >= 120:
        return clock_time(value)
    if 0 < value < 0.01:
        return f"{max(value, 1e-4):.2g} s"
    return f"{value:.2f} s" if value < 1 else f"{value:.1f} s"


def without_copies(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """`rows` less every column that repeats an earlier one, such as the loss where it is the normalised error."""
    kept: dict[str, list[Any]] = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        if values not in kept.values():
            kept[name] = values
    return [{name: values[i] for name, values in kept.items()} for i in range(len(rows))]


def human_bytes(value: int) -> str:
    """Bytes in binary units."""
    size, units = float(value), ("bytes", "KiB", "MiB", "GiB", "TiB")
    for unit in units:
        if abs(size) < 1024 or unit == units[-1]:
            break
        size /= 1024
    return f"{value} bytes" if unit == "bytes" else f"{size:,.1f} {unit}"


def clock_time(seconds: float) -> str:
    """Seconds as people read a clock, 1:02:03."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _json_ready(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _json_ready(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_json_ready(inner) for inner in value]
    if isinstance(value, bool) or value is None or isinstance(value, (int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)
