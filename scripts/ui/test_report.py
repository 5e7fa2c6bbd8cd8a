"""What `tierstream eval report` writes, in front of a reader without a network."""

import json
import subprocess

import pytest

from browser import View
from paths import ROOT, TARGET

DATA = ROOT / "crates/eval/tests/data"
PROGRAM = TARGET / "release/tierstream"
HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>"

SIZES = {"phone": {"width": 320, "height": 700}, "desk": {"width": 1280, "height": 800}}
SCHEMES = ["light", "dark"]


PREDICTIONS = [("pool_ram", 6.1, True), ("pool_ram", 9, True), ("pool_ram", 14, True), ("resident_ram", 19.5, False)]


def prediction(placement, gib, fits):
    """As docs/json.md has it."""
    return {
        "placement": placement, "ram_bytes": int(gib * 2**30), "vram_bytes": 0, "pool_bytes": int(gib * 2**29),
        "fits": fits, "hit_rate": gib / 20, "tok_s": gib, "tok_s_low": 0.8 * gib, "tok_s_high": 1.3 * gib,
        "limited_by": "drive",
    }


def program(*arguments):
    subprocess.run([PROGRAM, *arguments], check=True, stdout=subprocess.DEVNULL, timeout=100)


@pytest.fixture(scope="session")
def reports(tmp_path_factory):
    """A page of one trace with a domain that is markup, and one of two with a plan."""
    folder = tmp_path_factory.mktemp("reports")
    hostile = folder / "hostile.parquet"
    program("trace", "import", DATA / "olmoe.parquet", hostile, "--domain", HOSTILE)
    program("eval", "report", hostile, "-o", folder / "one.html")
    plan = folder / "plan.json"
    plan.write_text(json.dumps({"model": "m.gguf", "sentence": "Stream it.", "predictions": [
        prediction(place, gib, fits) for place, gib, fits in PREDICTIONS]}))
    two = [DATA / "qwen.parquet", DATA / "gptoss.parquet"]
    program("eval", "report", *two, "--plan", plan, "-o", folder / "two.html")
    return folder


@pytest.fixture
def read(browser, reports):
    views = []

    def read(page, size, scheme):
        options = {"viewport": SIZES[size], "color_scheme": scheme, "offline": True}
        views.append(View(browser, reports.as_uri(), f"/{page}.html", **options))
        return views[-1]

    yield read
    for view in views:
        view.context.close()


def boxes(view, selector):
    """Of what is shown: left, right, width, height in pixels, and the text."""
    return view.page.evaluate("""selector => [...document.querySelectorAll(selector)]
        .filter(node => node.checkVisibility())
        .map(node => [node.getBoundingClientRect(), node.textContent])
        .map(([box, text]) => [box.left, box.right, box.width, box.height, text])""", selector)


def brightness(view, name):
    """Of a color, from 0 to 255."""
    color = view.page.evaluate(f"getComputedStyle(document.body).getPropertyValue('--{name}')").strip().lstrip("#")
    parts = [color[at:at + len(color) // 3] for at in range(0, len(color), len(color) // 3)]
    return sum(int(part * (2 // len(part)), 16) for part in parts) / 3


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("page", ["one", "two"])
def test_it_can_be_read(read, page, size, scheme):
    view = read(page, size, scheme)
    view.check()
    wide = SIZES[size]["width"]
    charts = boxes(view, "svg.chart")
    assert len(charts) == {"one": 6, "two": 1 + 2 * 5 + 1}[page]
    for left, right, width, height, _ in charts:
        assert width > 200 and height > 100
        assert 0 <= left and right <= wide
    for left, right, width, height, text in boxes(view, "svg.chart text"):
        assert width > 0 and height > 0, text
        assert 0 <= left and right <= wide, text
    for selector in ["svg.chart path", "svg.chart .bar", "svg.chart .dot", "figure", ".tiles li"]:
        assert len(boxes(view, selector)) > 3, selector
    # Paper and ink change places.
    assert (brightness(view, "panel") > 128) == (brightness(view, "text") < 128) == (scheme == "light")
    assert len(view.page.screenshot(full_page=True)) > 50_000
    view.check_access()


@pytest.mark.parametrize("size", SIZES)
def test_all_numbers_can_be_opened(read, size):
    view = read("two", size, "light")
    for summary in view.at("summary").all():
        summary.click()
    assert len(boxes(view, "figure details table")) == len(boxes(view, "figure"))
    view.check()
    view.check_access()


def test_labels_do_not_lie_on_each_other(read):
    for size in SIZES:
        view = read("two", size, "light")
        over = view.page.evaluate("""() => [...document.querySelectorAll("svg.chart")].flatMap(chart => {
            const texts = [...chart.querySelectorAll("text")].filter(node => node.checkVisibility());
            const all = texts.map(node => [node.getBoundingClientRect(), node.textContent]);
            return all.flatMap(([a, text], index) => all.slice(index + 1)
                .filter(([b]) => a.left < b.right && b.left < a.right && a.top + 4 < b.bottom && b.top + 4 < a.bottom)
                .map(([, other]) => [text, other]));
        })""")
        assert over == []


def test_strings_of_a_trace_are_text(read):
    view = read("one", "desk", "light")
    view.page.on("dialog", lambda dialog: view.told.append(dialog.message))
    assert HOSTILE in view.at("dl.facts").inner_text()
    assert view.at("img, script, [onerror]").count() == 0
    view.check()


def test_it_can_be_printed(read):
    view = read("two", "desk", "dark")
    view.page.emulate_media(media="print")
    # Paper is white, whatever the reader's screen is.
    assert brightness(view, "panel") == 255
    assert view.page.pdf().startswith(b"%PDF")
    view.check()
