import contextlib

import pytest
from playwright.sync_api import sync_playwright

from browser import View, launch
import server as servers


@pytest.fixture(scope="session")
def browser():
    with sync_playwright() as playwright:
        browser = launch(playwright)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Scripted models."""
    folder = tmp_path_factory.mktemp("models")
    servers.write_models(folder)
    return folder


@pytest.fixture
def start(folder):
    """Starts servers, which the end of the test ends."""
    with contextlib.ExitStack() as running:
        yield lambda **options: running.enter_context(servers.scripted(folder, **options))


@pytest.fixture
def look(browser):
    """Opens the page of a server, at a desk if nothing else is said."""
    views = []

    def look(server, **options):
        views.append(View(browser, server.url, **({"viewport": {"width": 1280, "height": 800}} | options)))
        return views[-1]

    yield look
    for view in views:
        view.context.close()
