"""Measures the server with the demo model: many clients at once, and what HTTP costs beside `run`.

    cargo build --release -p tierstream && cargo build --release -p tierstream-server --example load
    python3 scripts/bench_server.py > benches/results/DATE-server-2core.txt

The load is `crates/server/examples/load.rs`. Beside `run`, rounds alternate which of the two is first; the ratio is
of tokens per second after the first token, as the client sees them and as `run --json` tells them. One compute
thread, so that on two cores the client has the other one.
"""

import contextlib
import http.client
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
RELEASE = ROOT / os.environ.get("CARGO_TARGET_DIR", "target") / "release"
PROGRAM = RELEASE / "tierstream"
HOST = "127.0.0.1:11561"
PROMPT = "It was a cold evening in November, and the old gentleman sat by the fire,"
TOKENS, ROUNDS = 400, 15


@contextlib.contextmanager
def serving(*flags):
    command = [PROGRAM, "serve", "--host", HOST, "--json", "-t", "1", *flags]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        # Its first words are that it listens.
        server.stdout.readline()
        while not answers():
            time.sleep(0.05)
        yield server
    finally:
        server.terminate()
        server.wait()


def answers():
    try:
        connection = http.client.HTTPConnection(HOST)
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False


def load(clients, seconds, *flags):
    with serving(*flags) as server:
        command = [RELEASE / "examples/load", HOST, "demo", str(clients), str(seconds), str(server.pid)]
        told = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    print(json.dumps({"flags": flags, "seconds": seconds, **told}), flush=True)


def over_http():
    """Tokens per second after the first one."""
    connection = http.client.HTTPConnection(HOST)
    options = {"temperature": 0, "num_predict": TOKENS}
    body = {"model": "demo", "prompt": PROMPT, "raw": True, "options": options}
    connection.request("POST", "/api/generate", json.dumps(body))
    times = []
    for line in connection.getresponse():
        if json.loads(line)["done"]:
            break
        times.append(time.perf_counter())
    # A token of half a character comes with the next one.
    return (TOKENS - 1) / (times[-1] - times[0])


def run():
    command = [PROGRAM, "run", "demo", PROMPT, "-n", str(TOKENS), "--temp", "0", "-t", "1", "--json"]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)["tok_s"]


def overhead():
    ratios = []
    with serving("--parallel", "1"):
        over_http()
        for number in range(ROUNDS):
            rates = {}
            for which in [over_http, run][:: 1 if number % 2 else -1]:
                rates[which] = which()
            ratios.append(rates[over_http] / rates[run])
            print(f"run {rates[run]:.0f} tok/s, HTTP {rates[over_http]:.0f} tok/s: {ratios[-1]:.3f}", flush=True)
    print(f"HTTP / run: median {statistics.median(ratios):.3f} of {ROUNDS}")


def main():
    print("load", os.getloadavg(), flush=True)
    load(64, 60, "--parallel", "8")
    load(64, 60, "--parallel", "64", "--ctx", "256")
    load(64, 60, "--parallel", "8", "--experts", "25%")
    overhead()
    sys.stdout.flush()


main()
