"""The report in a real browser: it renders, the controls work, nothing is fetched and nothing complains."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

OPTIONS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("there is no Chromium here")
    with playwright.sync_playwright() as driver:
        try:
            opened = driver.chromium.launch(executable_path=found, headless=True, args=OPTIONS)
        except playwright.Error as error:
            pytest.skip(f"Chromium does not start here: {str(error).splitlines()[0]}")
        yield opened
        opened.close()


class Visit:
    """An open report, and what went wrong in it."""

    def __init__(self, browser: Any, file: str, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(Path(file).as_uri())
        self.page.wait_for_function("document.documentElement.dataset.maps === 'ready'", timeout=20_000)

    def pixels(self, name: str) -> list[int]:
        """Sum of each colour over a map's canvas."""
        made: list[int] = self.page.evaluate(
            """name => { const c = document.querySelector(`[data-map=${name}] canvas`);
            const copy = new OffscreenCanvas(c.width, c.height).getContext('2d', {willReadFrequently: true});
            copy.drawImage(c, 0, 0);
            const d = copy.getImageData(0, 0, c.width, c.height).data, s = [0, 0, 0];
            for (let i = 0; i < d.length; i += 4) for (let j = 0; j < 3; j++) s[j] += d[i + j]; return s; }""",
            name,
        )
        return made

    def text(self, selector: str) -> str:
        return str(self.page.inner_text(selector))

    def close(self) -> None:
        self.context.close()
        assert self.said == [] and len(self.asked) == 1, (self.said, self.asked)


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_renders_everywhere(browser: Any, full: dict[str, Any], width: int, theme: str) -> None:
    visit = Visit(browser, full["file"], viewport={"width": width, "height": 844}, color_scheme=theme)
    room, shade = visit.page.evaluate(
        "[document.documentElement.scrollWidth, getComputedStyle(document.body).backgroundColor]"
    )
    assert room == width  # nothing makes the page scroll sideways
    light = sum(int(part) for part in shade.strip("rgb()").split(",")[:3]) / 3
    assert (light > 200) if theme == "light" else (light < 60)
    assert visit.page.locator("h2:visible").count() == 6
    for plot in visit.page.locator(".plot svg").all():
        box = plot.bounding_box()
        assert box["width"] > 150 and box["height"] > 150 and box["x"] >= 0 and box["x"] + box["width"] <= width
    assert min(visit.pixels("teacher")) > 0
    button = visit.page.locator("#theme").bounding_box()
    assert button["height"] >= 36
    visit.close()


BEYOND = """() => { const room = document.documentElement.clientWidth;
return [...document.querySelectorAll('body *')].filter(e => {
  const box = e.getBoundingClientRect();
  return box.width && (box.right > room + 0.5 || box.left < -0.5
    || (e.scrollWidth > e.clientWidth + 1 && ['auto', 'scroll'].includes(getComputedStyle(e).overflowX)));
}).map(e => `${e.tagName} ${e.id || e.className} ${e.textContent.slice(0, 40)}`); }"""
"""What reaches beyond the page's sides, or would have to be scrolled sideways inside it."""


@pytest.mark.parametrize("width", [320, 390])
def test_nothing_of_it_scrolls_sideways_on_a_phone(browser: Any, full: dict[str, Any], width: int) -> None:
    visit = Visit(browser, full["file"], viewport={"width": width, "height": 844}, is_mobile=True, has_touch=True)
    page = visit.page
    page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    assert page.evaluate(BEYOND) == []
    assert page.locator("nav a:visible").count() == 6 and page.locator(".scroll:visible").count() > 4
    names = page.evaluate(
        "[...document.querySelectorAll('#environment .scroll tbody tr:first-child :is(th, td)')].map("
        "one => getComputedStyle(one, '::before').content)"
    )
    assert names == [f'"{name}"' for name in ("stage", "tokens", "steps", "first loss", "last loss", "time")]
    for target in page.locator(":is(a, button, select, summary):visible:not(.skip)").all():
        box = target.bounding_box()
        assert box["height"] >= 40 and box["width"] >= 40, (target.inner_text(), box)
    for plot in page.locator(".chart:has(.tip) .plot").all():
        plot.scroll_into_view_if_needed()
        box = plot.bounding_box()
        for share in (0.02, 0.45, 0.55, 0.98):  # the words beside the finger stay on the page, too
            page.mouse.move(box["x"] + share * box["width"], box["y"] + 40)
            assert page.evaluate(BEYOND) == [] and page.evaluate("innerWidth") == width
    visit.close()


@pytest.mark.parametrize("width", [320, 1280])
def test_tables_of_many_columns_become_cards(browser: Any, tmp_path: Path, width: int) -> None:
    from linearize.report.charts import Axis, Series, line_chart
    from linearize.report.page import page as written
    from linearize.report.parts import grid, section

    lines = [Series(name=f"a rather long name, layer {i}", points=[(1, 1.5), (2, 123456.7)]) for i in range(12)]
    charts = [line_chart(lines[:n], title=f"{n} lines", x=Axis(label="step"), y=Axis(label="loss")) for n in (12, 6, 2)]
    body = section("training", "Training", "", grid(*charts))
    file = tmp_path / "many.html"
    file.write_text(written(name="n", lede="l", cards="", sections=[("training", "Training", body)], footer="f"))
    page = browser.new_page(viewport={"width": width, "height": 844})
    page.goto(file.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    assert page.evaluate(BEYOND) == []
    cards = page.evaluate("[...document.querySelectorAll('tbody tr')].map(row => getComputedStyle(row).display)")
    assert cards == ["grid"] * (2 if width == 1280 else 6) + ["table-row"] * (4 if width == 1280 else 0)
    page.close()


def test_a_finger_near_a_dot_chooses_it(browser: Any, full: dict[str, Any]) -> None:
    visit = Visit(browser, full["file"], viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)
    page = visit.page
    page.locator(".scatter .plot").scroll_into_view_if_needed()
    dots = page.evaluate(
        "[...document.querySelectorAll('.scatter .dot')].map(d => { const b = d.getBoundingClientRect();"
        " return [d.dataset.row, (b.left + b.right) / 2, (b.top + b.bottom) / 2]; })"
    )
    row, x, y = min(dots, key=lambda dot: dot[2])  # the highest: nothing lies above it
    chosen = full["attention"][int(row)]
    page.select_option("#layer", str(next(i for i in (0, 2) if i != chosen["layer"])))
    page.touchscreen.tap(x, y - 15)
    assert (page.input_value("#layer"), page.input_value("#head")) == (str(chosen["layer"]), str(chosen["head"]))
    visit.close()


def test_layer_and_head_redraw_the_maps(browser: Any, full: dict[str, Any]) -> None:
    visit = Visit(browser, full["file"], viewport={"width": 1280, "height": 900})
    page = visit.page
    assert (page.input_value("#layer"), page.input_value("#head")) == ("2", "3")
    rows = {(row["layer"], row["head"]): row for row in full["attention"]}

    def shows(layer: int, head: int) -> None:
        row = rows[layer, head]
        for name in ("teacher", "student"):
            assert visit.text(f"[data-map={name}] .entropy") == f"{row[name]['entropy']:.2f}"
            assert visit.text(f"[data-map={name}] .monotone") == f"{row[name]['monotonicity']:.2f}"
            label = page.get_attribute(f"[data-map={name}] canvas", "aria-label")
            assert f"layer {layer}, head {head}" in label

    shows(2, 3)
    before = [visit.pixels(name) for name in ("teacher", "student", "linear")]
    page.select_option("#head", "0")
    shows(2, 0)
    after = [visit.pixels(name) for name in ("teacher", "student", "linear")]
    assert all(a != b for a, b in zip(before, after, strict=True))
    page.click("[data-move=layer][data-by='-1']")
    shows(1, 0)
    assert page.locator("[data-map=linear] .empty").is_visible()  # a layer that stayed softmax
    assert not page.locator("[data-map=linear] canvas").is_visible()
    page.click("[data-move=head][data-by='-1']")
    shows(1, 3)  # round the end
    page.locator(".dot[data-row='0'].student").dispatch_event("click")
    shows(0, 0)
    assert page.locator(".dot.on").count() == 2
    places = visit.page.evaluate("[...document.querySelectorAll('.scatter .dot')].map(d => d.classList.contains('on'))")
    chosen = sum(places)
    assert 0 < chosen < len(places) and all(places[-chosen:])  # drawn last, so nothing hides it
    visit.close()


def test_pointer_and_keys_say_who_reads_what(browser: Any, full: dict[str, Any]) -> None:
    visit = Visit(browser, full["file"], viewport={"width": 1280, "height": 900})
    page = visit.page
    canvas = page.locator("[data-map=student] canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    count = page.evaluate("JSON.parse(document.querySelector('#attention-data').textContent).tokens")
    unit = box["width"] / count
    page.mouse.move(box["x"] + 10.5 * unit, box["y"] + 20.5 * unit)
    assert visit.text(".readout").startswith("Token 20 ") and " reads 10 " in visit.text(".readout")
    assert page.locator(".strip .here").count() == 1 and page.locator(".strip .later").count() == count - 21
    canvas.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowLeft")
    assert visit.text(".readout").startswith("Token 21 ") and " reads 9 " in visit.text(".readout")
    chart = page.locator(".chart .plot").first
    chart.scroll_into_view_if_needed()
    chart.hover()
    assert page.locator(".chart .tip").first.is_visible() and visit.text(".chart .tip b").strip()
    visit.close()


def test_the_button_changes_the_theme_and_the_maps_with_it(browser: Any, full: dict[str, Any]) -> None:
    visit = Visit(browser, full["file"], viewport={"width": 1280, "height": 900}, color_scheme="light")
    page = visit.page
    shade = lambda: page.evaluate("getComputedStyle(document.body).backgroundColor")  # noqa: E731
    before, drawn = shade(), visit.pixels("teacher")
    page.click("#theme")
    assert shade() != before and sum(visit.pixels("teacher")) < sum(drawn) and visit.text("#theme") == "Light"
    page.click("#theme")
    assert shade() == before and visit.pixels("teacher") == drawn
    page.emulate_media(media="print")
    assert not page.locator("nav").is_visible() and page.locator("#maps").is_visible()
    visit.close()


def test_markup_in_tokens_and_names_stays_text(
    browser: Any, full: dict[str, Any], places: dict[str, Path], tmp_path: Path
) -> None:
    """A hostile run: its names carry scripts, and none of them runs."""
    import json

    import linearize

    evil = "<img src=x onerror=\"document.title='broken'\"><script>document.title='broken'</script>"
    run = tmp_path / "run"
    shutil.copytree(places["run"], run)
    manifest = json.loads((run / "linearize.json").read_text())
    manifest["teacher"]["name"] = manifest["recipe"]["summary"] = manifest["name"] = evil
    manifest["recipe"][evil] = {evil: evil}
    manifest["versions"][evil] = evil
    (run / "linearize.json").write_text(json.dumps(manifest))
    (tmp_path / "text.txt").write_text(evil * 60)
    found = linearize.report(
        run, out=tmp_path / "r.html", against=places["teacher"], data=str(tmp_path / "text.txt"), device="cpu"
    )
    visit = Visit(browser, found["file"], viewport={"width": 390, "height": 844})
    page = visit.page
    page.click("[data-move=head][data-by='1']")
    page.locator(".strip span").nth(12).click()
    assert "broken" not in page.title().removesuffix(" - linearize").removeprefix(evil) and evil in visit.text("h1")
    assert page.locator("img").count() == 0 and page.evaluate("document.scripts.length") < 20
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert "<img" in visit.text(".strip")
    visit.close()
