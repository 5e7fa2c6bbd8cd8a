"""A browser that has the page open, and what is asked of every page."""

import re
import shutil

from playwright.sync_api import expect

from paths import TARGET

AXE = TARGET / "ui/node_modules/axe-core/axe.min.js"

expect.set_options(timeout=20_000)


def launch(playwright):
    """The system's Chromium."""
    program = shutil.which("chromium")
    assert program, "there is no chromium"
    return playwright.chromium.launch(executable_path=program)


class View:
    """The page, as one user sees it."""

    def __init__(self, browser, url, path="/ui", **options):
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.told = []
        self.page.on("console", lambda message: self.told.append(message.text))
        self.page.on("pageerror", lambda error: self.told.append(str(error)))
        self.asked = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.url = url
        self.page.goto(url + path)

    def at(self, selector):
        return self.page.locator(selector)

    def send(self, text):
        """Says something to the model `one`."""
        self.at("#model").select_option("one")
        self.at("#prompt").fill(text)
        self.at("#prompt").press("Enter")

    def colors(self):
        """How many dots of the cells, left of the layers' bars, have each color."""
        return self.page.evaluate("""() => {
            const map = document.getElementById("map");
            const pen = new OffscreenCanvas(map.width, map.height).getContext("2d", { willReadFrequently: true });
            pen.drawImage(map, 0, 0);
            const { data } = pen.getImageData(0, 0, map.width * 0.6, map.height);
            const colors = {};
            for (let i = 0; i < data.length; i += 4) {
                const color = data.slice(i, i + 3).join();
                colors[color] = (colors[color] ?? 0) + 1;
            }
            return colors;
        }""")

    def cold(self):
        """How many of those dots are of experts that nobody asks for."""
        color = self.page.evaluate("getComputedStyle(document.body).getPropertyValue('--heat-0')")
        return self.colors().get(",".join(str(int(color.strip()[at:at + 2], 16)) for at in (1, 3, 5)), 0)

    def check(self, allowed=r"(?!)"):
        """No complaint in the console but those allowed, nothing asked of others, no figure that is none."""
        told = [text for text in self.told if not re.search(allowed, text)]
        assert told == []
        foreign = [url for url in self.asked if not url.startswith(self.url + "/")]
        assert foreign == []
        text = self.at("body").inner_text()
        assert not re.search(r"NaN|undefined|null|Infinity|\[object", text), text
        wide = self.page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert wide[0] <= wide[1], "there is something to scroll to the side"

    def check_access(self):
        """What axe finds: nothing."""
        self.page.evaluate(AXE.read_text())
        found = self.page.evaluate("axe.run()")
        told = [(one["id"], [node["html"] for node in one["nodes"]]) for one in found["violations"]]
        assert told == []
        assert len(found["passes"]) > 10
