import os

import pytest

import servers
from store import write_story

pytest_plugins = ["server_fixtures"]


@pytest.fixture
def server(start):
    """A server of its own for each test."""
    return start()


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """The program itself, for a user of a home of its own: the demo model, and `story`."""
    home = tmp_path_factory.mktemp("home")
    write_story(home / "models")
    environment = {"HOME": str(home), "PATH": os.environ["PATH"], "OLLAMA_MODELS": str(home / "models")}
    with servers.program("--threads", "1", env=environment) as server:
        yield server
