"""The page from its facts: what is left out says so, and nothing of a checkpoint is taken for markup."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from linearize.report import page as page_module
from linearize.report.attention import packed
from linearize.report.bench import Curve
from linearize.report.charts import Axis, Bar, Scale, Series, as_json, bar_table, in_bytes, line_chart, short
from linearize.report.facts import memory_of, number, read_history, text, whole
from linearize.report.make import render
from linearize.report.sections import cards, quality, training

EVIL = "\"><script>alert(1)</script><img src=x onerror=alert(2)>'--></style>\u2028${title}&amp;"
MANIFEST: dict[str, Any] = {
    "name": "run", "teacher": {"name": "a-teacher", "digest": "ab" * 32}, "versions": {"torch": "2.13.0"},
    "recipe": {"name": "lolcats", "paper": "arXiv:2410.10254", "summary": "Words.", "mixer": {"window": 64}},
    "data": {"name": "text.txt", "bytes": 1234, "sha256": "cd" * 32},
    "figures": {
        "layers": [{"layer": 0, "explained": 0.9}, {"layer": 2, "explained": -3.0}],
        "stages": {"align": {"tokens": 1000, "steps": 4, "loss_first": 1.0, "loss_last": 0.5, "seconds": 3.0},
                   "finetune": {"tokens": 0, "steps": 0, "skipped": "finetune.tokens is 0"}},
    },
}  # fmt: skip
FOUND: dict[str, Any] = {
    "kv_bytes": {"2048": 1 << 20}, "softmax_kv_bytes": {"2048": 1 << 18}, "state_bytes": 4096, "heads": 2,
    "break_even_context": 600, "context": 256,
    "layers": [{"mixer": "linear"}, {"mixer": "softmax"}, {"mixer": "linear"}],
}  # fmt: skip
AUDIT: dict[str, Any] = {
    "R": 61.24, "protocol": "concat@256", "windows": 64, "tokens": 16320, "ppl_teacher": 10.0, "ppl_window": 20.0,
    "ppl_student": 13.0, "branches": {"full": 13.0, "window": 19.0, "linear": 900.0, "none": None}, "notes": ["a note"],
    "by_position": [{"from": 0, "to": 64, "tokens": 9, "teacher": 12.0, "window": 12.0, "student": 12.1},
                    {"from": 64, "to": 128, "tokens": 9, "teacher": 9.0, "window": 25.0, "student": 13.0}],
}  # fmt: skip
HISTORY = {"align": {"loss": [(1.0, 2.0), (2.0, 1.0)], "match/0": [(1.0, -9.0), (2.0, 0.9)], "match/2": [(1.0, 0.5)]}}


KEPT = {
    "name", "teacher", "recipe", "figures", "layers", "stages", "align", "finetune", "versions", "data", "mixer",
    "skipped", "paper", "summary", "explained", "layer", "notes", "protocol", "branches", "by_position",
}  # fmt: skip
"""Keys that `poisoned` leaves alone, so that what lies under them is still found."""


def poisoned(value: Any) -> Any:
    """The same with markup in every text and key."""
    if isinstance(value, dict):
        keys = {key: key if key in KEPT else f"{key}{EVIL}" for key in value}
        return {keys[key]: poisoned(inner) for key, inner in value.items()} | ({EVIL: EVIL} if value else {})
    if isinstance(value, list):
        return [*map(poisoned, value), EVIL]
    return EVIL if isinstance(value, str) else value


def shown() -> dict[str, Any]:
    import numpy as np

    from linearize.report.attention import LayerMaps

    even = np.tril(np.ones((2, 9, 9), dtype=np.float32))
    even /= even.sum(-1, keepdims=True)
    rows, maps = packed({0: LayerMaps(kind="linear", teacher=even, student=even, linear=even, scores=even)}, [0, 1])
    return {
        "tokens": 9, "texts": ["a", "b", EVIL, "\n", "", "\u202e", "d", "e", "f"], "source": "text.txt", "window": 2,
        "layers": [0], "heads": [0, 1], "of": (3, 2), "start": (0, 1), "rows": rows, "maps": maps,
    }  # fmt: skip


def made(manifest: Any = MANIFEST, **facts: Any) -> str:
    given: dict[str, Any] = {
        "found": FOUND, "history": HISTORY, "audit": AUDIT, "shown": shown(), "curves": [], "measured_on": "",
    }  # fmt: skip
    return render("run", Path("run"), manifest, **(given | facts))[""]


class Reader(HTMLParser):
    """What a browser would make of the page: elements, attributes, and what scripts hold."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "path", "rect", "wbr", "i"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("meta", "path", "rect", "wbr", "i"):
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append((self.tags[-1][1], data))
        elif self.open and self.open[-1] != "style":
            self.text += data


def test_the_page_stands_alone() -> None:
    page = made()
    read = Reader(page)
    assert not read.open
    names = [tag for tag, _ in read.tags]
    assert not {"link", "img", "iframe", "object", "embed", "base", "form"} & set(names)
    for tag, attributes in read.tags:
        assert not any(name.startswith("on") or name in ("src", "srcset", "action") for name in attributes), tag
        assert attributes.get("href", "#").startswith("#")
    assert "url(" not in page and "@import" not in page and "http://" not in page.replace("http://www.w3.org", "")
    code = [text for attributes, text in read.scripts if "type" not in attributes]
    assert len(code) == 1
    digest = base64.b64encode(hashlib.sha256(code[0].encode()).digest()).decode()
    policy = next(a["content"] for _, a in read.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy
    for attributes, text_ in read.scripts:
        if attributes.get("type") == "application/json":
            json.loads(text_)


def test_it_says_what_it_knows_to_who_only_hears_it() -> None:
    read = Reader(made())
    expected = [
        "61.2 %", "concat@256, 64 windows, 16,320 tokens", "2 of 3", "Finetuning was skipped: finetune.tokens is 0",
        "even at 600", "arXiv:2410.10254", "a note", "2.13.0", "Its linear branch alone", "1.21 KiB",
    ]  # fmt: skip
    for words in expected:
        assert words in read.text, words
    assert read.tags[0] == ("html", {"lang": "en"})
    assert {"header", "nav", "main", "footer", "section", "h1", "h2", "figure", "figcaption"} <= {
        t for t, _ in read.tags
    }
    for tag, attributes in read.tags:
        if attributes.get("role") == "img":
            assert attributes.get("aria-label"), tag
        if tag == "svg":
            assert "role" in attributes or attributes.get("aria-hidden") == "true"
    sections = [a for t, a in read.tags if t == "section"]
    ids = {a["id"] for _, a in read.tags if "id" in a}
    assert len(sections) == 6 and all(a["aria-labelledby"] in ids for a in sections)
    links = [a["href"] for t, a in read.tags if t == "a"]
    assert all(link is not None and link[1:] in ids for link in links)


def test_what_is_missing_names_the_command_that_adds_it() -> None:
    read = Reader(made(history={}, audit=None, shown=None))
    commands = [
        "linearize report run --against a-teacher --data TEXT",
        "linearize convert a-teacher OUT --recipe lolcats",
        "linearize bench run --against a-teacher --out bench.jsonl",
    ]
    for command in commands:
        assert command in read.text
    assert not [t for t, _ in read.tags if t == "canvas"] and "NaN" not in read.text


def test_a_masked_model_is_told_what_measures_it() -> None:
    read = Reader(made(audit=None, shown=None, found={**FOUND, "kv_bytes": {"2048": 0}}, masked=True))
    assert "linearize eval run --against a-teacher --data TEXT" in read.text
    assert "linearize bench" not in read.text and "Memory of one sequence" not in read.text


def test_nothing_of_a_checkpoint_is_taken_for_markup() -> None:
    """Names, tokens, recipe keys and notes that try to be more than text."""

    audit = {**AUDIT, "notes": [EVIL], "protocol": EVIL}
    curves = [Curve(figure=f"{EVIL}_bytes", name=EVIL, batch=2, teacher=False, points=[(1.0, 2.0), (4.0, 3.0)])]
    facts = shown() | {"source": EVIL}
    history = {"align": {**HISTORY["align"], f"match/{EVIL}": [(1.0, 2.0)]}, EVIL: {"loss": [(1.0, 1.0)]}}
    page = made(poisoned(MANIFEST), audit=audit, shown=facts, curves=curves, history=history, measured_on=EVIL)
    clean, read = Reader(made(curves=curves)), Reader(page)
    assert not read.open
    assert {tag for tag, _ in read.tags} <= {tag for tag, _ in clean.tags}
    assert len(read.scripts) == len(clean.scripts)
    assert {name for _, attributes in read.tags for name in attributes} <= {
        name for _, attributes in clean.tags for name in attributes
    }
    assert "<script>alert" not in page and "<img" not in page and "\u2028" not in "".join(t for _, t in read.scripts)
    assert EVIL.replace("&amp;", "&") in read.text or "alert(1)" in read.text


@pytest.mark.parametrize(
    "damage",
    [
        {}, {"figures": 5}, {"figures": {"layers": "x", "stages": []}}, {"recipe": [1]},
        {"recipe": {"mixer": {"a": {"b": [{}]}}}}, {"teacher": "x", "data": None, "versions": 3, "name": 7},
        {"figures": {"layers": [{"layer": True, "explained": "1"}]}},
        {"figures": {"stages": {"align": {"tokens": 10**400, "steps": 1, "seconds": 1e308, "skipped": {}}}}},
    ],
)  # fmt: skip
def test_a_manifest_of_another_shape_leaves_gaps_not_tracebacks(damage: dict[str, Any]) -> None:
    assert "<h1>" in made(damage, history={}, audit={}, shown=None)
    assert "<h1>" in made(damage, audit={"R": "x", "branches": 3, "by_position": [{}, 5], "notes": "abc"}, found={})


def test_recovery_beyond_its_ends_is_said_in_words() -> None:
    low = quality({**AUDIT, "R": -250.0}, "")
    assert "-250.0 %" in low and "width:0.0%" in low and "The cut teacher is better" in low
    assert '<output class="worse"' in low and '<output class="worse"' not in quality({**AUDIT, "R": 5.0}, "")
    assert 'class="first worse"' in cards({}, {**AUDIT, "R": -250.0}, None, "2")
    assert 'class="first"' in cards({}, {**AUDIT, "R": 250.0}, None, "2") and "<div><dt>" in cards({}, None, None, "2")
    assert "width:100.0%" in quality({**AUDIT, "R": 104.0}, "") and "104.0 %" in quality({**AUDIT, "R": 104.0}, "")
    assert "Branch audit" in quality({**AUDIT, "R": None}, "") and "Recovery</b>" not in quality(
        {**AUDIT, "R": None}, ""
    )


def test_a_share_fills_its_bar_only_where_it_is_all() -> None:
    """The best layer explains 80 %: its bar has room left."""
    layers = [{"layer": i, "explained": share} for i, share in enumerate((0.8, 0.25, -0.5))]
    html = training({"figures": {"layers": layers}}, {}, "")
    assert re.findall(r'class="student" width="([\d.]+)"', html) == ["80", "25", "0.4"]
    assert "-50.0 %" in html


def test_long_curves_get_a_running_mean_and_layers_a_ramp() -> None:
    points = [(float(i), 1.0 + (i % 2)) for i in range(1, 101)]
    html = training(MANIFEST, {"finetune": {"loss": points, "kl": points, "ce": [(x, y + 1) for x, y in points]}}, "")
    assert html.count("running mean") >= 2 and "Cross-entropy with the next token" in html
    assert "KL from the teacher" not in html  # it is the loss itself
    layers = {f"{kind}/{i}": [(1.0, 0.1 * i + 0.1), (2.0, 0.5)] for i in range(3) for kind in ("match", "loss")}
    ramp = training(MANIFEST, {"align": layers}, "")
    assert "Match of each layer over time" in ramp and "Loss of each layer over time" in ramp
    assert "--t:0%" in ramp and "--t:100%" in ramp and "layer 0" in ramp


def test_a_chart_puts_points_where_they_belong() -> None:
    x, y = Axis(label="x", log=True, base=2), Axis(label="y", low=0.0, high=10.0)
    html = line_chart([Series(name="a", points=[(1, 0), (4, 5), (16, 10)])], title="t", x=x, y=y)
    assert 'd="M0 100L50 50L100 0"' in html and ">16<" in html and "a from 0 to 10" in html
    held = json.loads(re.search(r'class="points">(.*?)</script>', html)[1])  # type: ignore[index]
    assert held["x"] == {"log": True, "low": 1, "high": 16} and held["series"][0]["at"][1] == [4, "4", "5"]
    assert line_chart([Series(name="a", points=[(0, 1), (float("nan"), 2)])], title="t", x=x, y=y) == ""
    flat = line_chart([Series(name="a", points=[(2, 5)])], title="t", x=x, y=Axis(label="y"))
    assert 'd="M' in flat  # one point is no division by zero


def test_ticks_are_round_numbers_in_range() -> None:
    plain, log, two = Axis(label=""), Axis(label="", log=True), Axis(label="", log=True, base=2)
    scale = lambda axis, low, high: [short(t) for t in Scale(axis, low, high, padded=False).ticks]  # noqa: E731
    assert scale(plain, 0, 37) == ["0", "10", "20", "30"]
    assert scale(log, 0.0015, 0.6) == ["0.003", "0.01", "0.03", "0.1", "0.3"]
    assert scale(log, 9, 150) == ["10", "30", "100"] and scale(log, 14, 21) == ["14", "16", "18", "20"]
    assert scale(log, 1, 1e9)[0] == "1" and len(scale(log, 1, 1e9)) <= 6
    assert scale(two, 128, 2048) == ["128", "256", "512", "1024", "2048"]


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_colours_can_be_told_from_their_ground(theme: int) -> None:
    """Words by 4.5 to 1, what is drawn by 3 to 1 (WCAG 2.2, 1.4.3 and 1.4.11)."""
    style = (Path(page_module.__file__).parent / "style.css").read_text()
    colours = {m[1]: m[2 + theme] for m in re.finditer(r"--([\w-]+): light-dark\(#(\w{6}), #(\w{6})\)", style)}

    def light(name: str) -> float:
        parts = [int(colours[name][i : i + 2], 16) / 255 for i in (0, 2, 4)]
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    least = dict.fromkeys(("ink", "soft", "accent", "negative"), 4.5) | {"pale": 3.0, "deep": 3.0}
    for name, ratio in least.items():
        for ground in ("page", "surface", "sunk"):
            low, high = sorted((light(name), light(ground)))
            assert (high + 0.05) / (low + 0.05) >= ratio, (name, ground)
    assert "opacity" not in style.partition(".strip .later")[2].partition("}")[0]  # which would undo it


def test_no_tick_lies_between_two_steps() -> None:
    plain, steps = (Axis(label="step", write=lambda v: f"{v:,.0f}", counts=counts) for counts in (False, True))
    assert len(Scale(plain, 1, 2, padded=False).ticks) > 2  # which would be written 1, 1, 1, 2, 2
    assert Scale(steps, 1, 2, padded=False).ticks == [1, 2] and Scale(steps, 1, 4, padded=False).ticks == [1, 2, 3, 4]
    assert Scale(steps, 0, 500, padded=False).ticks == [0, 100, 200, 300, 400, 500]


@pytest.mark.parametrize("high", [1.7e4, 1.9e7, 2.5e7, 3e9])
def test_bytes_have_ticks_that_are_round_in_binary(high: float) -> None:
    """4 MiB, 8 MiB, not 4.77 MiB, 9.54 MiB."""
    ticks = Scale(Axis(label="", base=2, low=0.0), 0.0, high, padded=True).ticks
    assert 3 <= len(ticks) <= 6 and ticks[0] == 0
    step = ticks[1]
    assert step == 2 ** (step.as_integer_ratio()[0].bit_length() - 1) and ticks == [step * i for i in range(len(ticks))]
    assert all(re.fullmatch(r"\d+ (bytes|[KMG]iB)", in_bytes(tick)) for tick in ticks)


def test_ticks_of_one_axis_are_written_alike() -> None:
    axis = Axis(label="tokens a second", low=0.0)
    made = line_chart(
        [Series(name="a", points=[(1.0, 7e3), (2.0, 22e3)])], title="Speed", x=Axis(label="context"), y=axis
    )
    shown = re.findall(r'<span style="bottom:[^>]*>([^<]+)<', made)
    assert shown == ["0", "5k", "10k", "15k", "20k"]


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.25, "0.25 s"), (51.6, "51.6 s"), (60.0, "1:00 min"), (3723.0, "1:02:03 h")]
)
def test_times_are_read_at_a_glance(seconds: float, shown: str) -> None:
    stages = {"align": {**MANIFEST["figures"]["stages"]["align"], "seconds": seconds}}
    assert f'data-name="time">{shown}</td>' in made({**MANIFEST, "figures": {"stages": stages}})


def test_bars_on_a_logarithmic_scale_keep_their_order() -> None:
    bars = [Bar(name=str(v), value=v, shown=str(v)) for v in (10.0, 100.0, 1000.0)]
    widths = [
        float(w)
        for w in re.findall(r'class="student" width="([\d.]+)"', bar_table(bars, title="t", heads=("a", "b"), log=True))
    ]
    assert (
        widths == sorted(widths)
        and widths[-1] == 100
        and widths[1] - widths[0] == pytest.approx(widths[2] - widths[1], abs=0.1)
    )


def test_figures_are_short() -> None:
    assert [short(v) for v in (0, 0.0123456, 3.14159, 1275.2, 11600, 2e6, 4e-7)] == [
        "0", "0.01235", "3.142", "1275", "11.6k", "2M", "4.0e-7",
    ]  # fmt: skip
    assert [in_bytes(v) for v in (5, 1000, 2048, 3 << 20)] == ["5 bytes", "1000 bytes", "2 KiB", "3 MiB"]
    assert json.loads(as_json("</script>&<!--\u2028")) == "</script>&<!--\u2028" and "<" not in as_json("</script>")


def test_values_of_the_wrong_kind_are_as_if_absent() -> None:
    assert [number(v) for v in (1, 2.5, True, "3", None, float("nan"), 10**400)] == [
        1.0,
        2.5,
        None,
        None,
        None,
        None,
        None,
    ]
    assert [whole(v) for v in (1, 2.5, True, 1 << 70)] == [1, None, None, None]
    assert text("x" * 999).endswith("...") and text({}) == "" and text([1, "a"]) == "1, a" and text(True) == "yes"
    assert memory_of({}) is None and memory_of({"kv_bytes": {"2048": 5}}) is None


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"format": 2, "stages": {}}', '{"format": 1, "stages": {"a": {"steps": [], "series": {}}}}',
     '{"format": 1, "stages": {"a": {"steps": [1], "series": {"loss": [1, 2], "x": "y", "z": [null]}}}}',
     '{"format": 1, "stages": {"a": {"steps": "abc", "series": 3}}}', "[" * 100_000],
)  # fmt: skip
def test_a_history_that_is_none_is_left_out(content: str, tmp_path: Path) -> None:
    (tmp_path / "history.json").write_text(content)
    assert read_history(tmp_path) == {}
    assert read_history(tmp_path / "nowhere") == {}


def contrast(one: str, other: str) -> float:
    """WCAG 2's contrast ratio of two colours #rrggbb."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1])
def test_words_and_lines_stand_out_from_what_is_behind_them(theme: int, root: Path) -> None:
    style = (root / "linearize" / "report" / "style.css").read_text()
    colours = {name: pair[theme] for name, *pair in re.findall(r"--(\w+): light-dark\((#\w+), (#\w+)\)", style)}
    for behind in ("page", "surface", "sunk"):
        assert min(contrast(colours[name], colours[behind]) for name in ("ink", "soft", "accent", "negative")) >= 4.5
    assert contrast(colours["pale"], colours["surface"]) >= 3
