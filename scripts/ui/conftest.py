import pytest
from playwright.sync_api import sync_playwright

from browser import View, launch

pytest_plugins = ["server_fixtures"]


@pytest.fixture(scope="session")
def browser():
    with sync_playwright() as playwright:
        browser = launch(playwright)
        yield browser
        browser.close()


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
