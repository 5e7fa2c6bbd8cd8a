"""Fixtures of all tests that want a server of scripted models."""

import contextlib

import pytest

import servers


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
