"""Makes the pictures of docs/ui.md: the demo model, with a quarter of its experts in memory.

Wants target/release/tierstream; run it with the Python of ./x ui:

    PYTHONPATH=scripts target/ui/bin/python scripts/ui/pictures.py
"""

import re

from playwright.sync_api import expect, sync_playwright

import servers
from browser import View, launch
from paths import ROOT

PROMPT = "It was a cold evening in November, and the old gentleman sat by the fire."
DESK = {"viewport": {"width": 1280, "height": 736}}
PICTURES = {
    "light": DESK | {"color_scheme": "light"},
    "dark": DESK | {"color_scheme": "dark"},
    "phone": {"viewport": {"width": 360, "height": 1110}, "device_scale_factor": 1.5, "color_scheme": "light"},
}

with servers.program("--experts", "25%", "-t", "1") as server, sync_playwright() as playwright:
    browser = launch(playwright)
    for name, options in PICTURES.items():
        view = View(browser, server.url, **options)
        expect(view.at("#model option")).not_to_have_count(0)
        # Several, so that the lines have something to show.
        for turn in range(4):
            view.at("#clear").click()
            view.at("#prompt").fill(PROMPT)
            view.at("#prompt").press("Enter")
            if turn < 3:
                expect(view.at("#log .model .more")).to_be_visible(timeout=120_000)
        expect(view.at("#log .model .text")).to_contain_text(re.compile(r"(\w+\W+){100}"), timeout=120_000)
        view.check()
        view.page.evaluate("scrollTo(0, 0)")
        view.page.screenshot(path=ROOT / f"docs/ui-{name}.png")
        view.context.close()
    browser.close()
