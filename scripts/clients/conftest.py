import contextlib

import pytest

import server as servers


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
def server(start):
    """A server of its own for each test."""
    return start()


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """The program itself, with models that compute."""
    with servers.program(tmp_path_factory.mktemp("home")) as server:
        yield server
