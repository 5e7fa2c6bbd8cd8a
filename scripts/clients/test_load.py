"""Many clients at once, for LOAD_SECONDS: crates/server/examples/load.rs."""

import json
import math
import os
import subprocess
import time

import httpx
import pytest

import servers
from paths import EXAMPLES

CLIENTS = 64
SECONDS = int(os.environ.get("LOAD_SECONDS", "60"))
# As many tokens as its clients ask for.
ANSWER = {"model": "demo", "prompt": "It was", "raw": True, "stream": False, "options": {"num_predict": 48}}


@pytest.fixture
def server(tmp_path):
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    with servers.program("--threads", "1", "--parallel", "8", env=environment) as server:
        yield server


def seconds(server):
    """So many, or on a slow machine enough for some answers to each client."""
    times = []
    # The first one loads the model.
    for _ in range(2):
        start = time.monotonic()
        httpx.post(server.url + "/api/generate", json=ANSWER, timeout=60).raise_for_status()
        times.append(time.monotonic() - start)
    return max(SECONDS, math.ceil(3 * CLIENTS * times[-1]))


@pytest.mark.timeout(600)
def test_many_clients(server):
    address = server.url.removeprefix("http://")
    command = [EXAMPLES / "load", address, "demo", CLIENTS, seconds(server), server.process.pid]
    told = json.loads(subprocess.run(map(str, command), check=True, stdout=subprocess.PIPE).stdout)
    print(told)
    assert told["errors"] == []
    assert told["answers"] >= CLIENTS
    # They take turns: none gets half as many tokens as another.
    assert told["slowest_to_fastest"] >= 0.5
    # What clients that left had asked for is not computed.
    assert told["free_after_leaving_s"] < 1
    # It is at rest after a quarter of the time, but for kept prompts.
    assert told["rss_mib"][-1] - told["rss_mib"][0] < 64
