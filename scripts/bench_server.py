"""Measures the server with the demo model: many clients at once, and what HTTP costs beside `run`.

    cargo build --release -p tierstream && cargo build --release -p tierstream-server --example load
    python3 scripts/bench_server.py > benches/results/DATE-server-2core.txt

The load is `crates/server/examples/load.rs`. Beside `run`, rounds alternate which of the two is first; the ratio is
of tokens per second after the first token, as the client sees them and as `run --json` tells them. One compute
thread, so that on two cores the client has the other one.
"""

import argparse
import http.client
import json
import os
import statistics
import subprocess
import time

import servers
from paths import EXAMPLES, TARGET

PROMPT = "It was a cold evening in November, and the old gentleman sat by the fire,"
TOKENS = 400


def serving(*flags):
    return servers.program("--threads", "1", *flags)


def load(clients, seconds, *flags):
    with serving(*flags) as server:
        command = [EXAMPLES / "load", address(server), "demo", clients, seconds, server.process.pid]
        told = json.loads(subprocess.run(map(str, command), check=True, stdout=subprocess.PIPE).stdout)
    print(json.dumps({"flags": flags, "seconds": seconds, **told}), flush=True)


def address(server):
    return server.url.removeprefix("http://")


def over_http(server):
    """Tokens per second after the first one."""
    connection = http.client.HTTPConnection(address(server))
    options = {"temperature": 0, "num_predict": TOKENS}
    body = {"model": "demo", "prompt": PROMPT, "raw": True, "options": options}
    connection.request("POST", "/api/generate", json.dumps(body))
    times = []
    for line in connection.getresponse():
        told = json.loads(line)
        if told["done"]:
            assert told["eval_count"] == TOKENS
            break
        times.append(time.perf_counter())
    # A token of half a character comes with the next one.
    return (TOKENS - 1) / (times[-1] - times[0])


def run():
    command = [TARGET / "release/tierstream", "run", "demo", PROMPT]
    flags = ["-n", str(TOKENS), "--temp", "0", "-t", "1", "--json"]
    return json.loads(subprocess.run(command + flags, check=True, stdout=subprocess.PIPE).stdout)["tok_s"]


def overhead(rounds):
    ratios = []
    with serving("--parallel", "1") as server:
        ways = {"HTTP": lambda: over_http(server), "run": run}
        # Loads the model.
        over_http(server)
        for number in range(rounds):
            rates = {name: ways[name]() for name in list(ways)[:: 1 if number % 2 else -1]}
            ratios.append(rates["HTTP"] / rates["run"])
            print(f"run {rates['run']:.0f} tok/s, HTTP {rates['HTTP']:.0f} tok/s: {ratios[-1]:.3f}", flush=True)
    spread = f"{min(ratios):.3f}-{max(ratios):.3f}"
    print(f"HTTP / run: median {statistics.median(ratios):.3f} ({spread}) of {rounds} rounds")


def main():
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--rounds", type=int, default=7, help="of HTTP beside run")
    flags.add_argument("--seconds", type=int, default=60, help="of each load")
    args = flags.parse_args()
    print("load average", os.getloadavg(), flush=True)
    load(64, args.seconds, "--parallel", "8")
    load(64, args.seconds, "--parallel", "64", "--ctx", "256")
    load(64, args.seconds, "--parallel", "8", "--experts", "25%")
    overhead(args.rounds)


main()
