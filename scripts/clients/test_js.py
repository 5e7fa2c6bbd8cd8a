"""The clients of npm: `js/`."""

import os
import pathlib
import subprocess

import pytest

from paths import TARGET

HERE = pathlib.Path(__file__).parent / "js"


def node(server, *arguments):
    modules = str(TARGET / "clients/js/node_modules")
    environment = os.environ | {"SERVER": server.url, "NODE_PATH": modules}
    pipe = subprocess.PIPE
    return subprocess.Popen(["node", *arguments], env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize("client", ["ollama", "openai"])
def test_client(server, client):
    with node(server, "--test", "--test-reporter=tap", HERE / f"{client}.test.cjs") as process:
        told = process.stdout.read()
    assert process.returncode == 0, told
    assert "\nok " in told


@pytest.mark.parametrize("client", ["ollama", "openai"])
def test_who_leaves_frees_the_sequence(start, client):
    server = start(sequences=1, gate=1)
    server.tell("open 20")
    with node(server, HERE / "leave.cjs", client) as process:
        server.tell("stopped 1")
        server.tell("open 1000000")
        assert process.stdout.read() == "y\n"
