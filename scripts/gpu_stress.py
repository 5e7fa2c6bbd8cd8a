"""Mixed load on a GPU for some minutes: clients with short and long prompts, clients that leave, models that take each
other's place, all with a quarter of their experts in the GPU's memory. No text may be another one than that of a quiet
server but by rounding.

    python3 scripts/gpu_stress.py PROGRAMS OUT [MINUTES]

PROGRAMS as for gpu-check.sh, with the demo model beside it (models/). GPU in the environment is its number, or none.
Exits with 1 if a text or an answer was wrong.

Kernels round differently for several tokens than for one, and which tokens are computed together hangs on what else there
is to do. So where a text leaves the quiet one, its token has to be nearly as likely there, and from there on the same
again. Wrong weights, or another sequence's tokens, give tokens that are not.
"""

import collections
import concurrent.futures
import http.client
import json
import math
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import time

PROGRAMS, OUT = (pathlib.Path(argument).resolve() for argument in sys.argv[1:3])
MINUTES = float(sys.argv[3]) if len(sys.argv) > 3 else 10
ENVIRONMENT = {**os.environ, "PATH": f"{PROGRAMS}:{os.environ['PATH']}"}
HOST = "127.0.0.1:11562"
CLIENTS = 6
# Nats by which a token may be less likely than the best one, if it is only rounding. Other texts' tokens are many.
CLOSE = 0.3
GPU = os.environ.get("GPU", "0")
TEXT = "It was a cold evening in November, and the old gentleman sat by the fire, "
PROMPTS = ["The sea was calm that night, and", "Sir, said the captain,", TEXT, "Once " + TEXT * 6, "My dear Elizabeth, " * 40]


def request(model, prompt, tokens, stream):
    body = {"model": model, "prompt": prompt, "stream": stream, "temperature": 0, "max_tokens": tokens, "logprobs": 5}
    connection = http.client.HTTPConnection(HOST, timeout=300)
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    return connection, connection.getresponse()


def answer(model, prompt, tokens):
    """The text, its tokens, and of each the likeliest ones there with their logarithms."""
    connection, response = request(model, prompt, tokens, stream=False)
    choice = json.loads(response.read())["choices"][0]
    connection.close()
    told = choice["logprobs"]
    return choice["text"], tuple(told["tokens"]), told["top_logprobs"]


def gap(model, prompt, tokens):
    """How much less likely, at most, tokens are than those of a quiet server. Several tokens with the same text count
    as the same one."""
    worst, at = 0.0, 0
    while at < len(tokens):
        _, quiet, likely = answer(model, prompt + "".join(tokens[:at]), len(tokens) - at)
        same = next((n for n, (a, b) in enumerate(zip(tokens[at:], quiet)) if a != b), None)
        if same is None:
            return worst if len(quiet) == len(tokens) - at else max(worst, CLOSE)
        best = max(likely[same].values())
        worst = max(worst, best - likely[same].get(tokens[at + same], -math.inf))
        if worst > CLOSE:
            return worst
        at += same + 1
    return worst


def client(seed, models, wanted, others, end):
    rng, seen = random.Random(seed), collections.Counter()
    while time.monotonic() < end:
        model, (prompt, tokens) = rng.choice(models), rng.choice(list(wanted))
        if rng.random() < 0.2:
            connection, response = request(model, prompt, 400, stream=True)
            response.read(rng.randrange(2000))
            # It leaves.
            response.close()
            connection.close()
            seen["left"] += 1
            continue
        text, made, _ = answer(model, prompt, tokens)
        if text == wanted[prompt, tokens]:
            seen["the quiet text"] += 1
        else:
            others[prompt, made] += 1
    return seen


def main():
    with tempfile.TemporaryDirectory() as folder:
        demo = next(path for path in pathlib.Path(os.environ.get("MODELS", "models")).glob("*.gguf"))
        models = [f"stress{n}" for n in range(3)]
        for name in models:
            shutil.copy(demo, pathlib.Path(folder) / f"{name}.gguf")
        files = [str(pathlib.Path(folder) / f"{name}.gguf") for name in models]
        command = ["tierstream", "serve", *files, "--host", HOST, "--json", "--gpu", GPU, "--experts", "25%",
                   "--max-models", "2", "--parallel", "2", "--ctx", "1024"]
        with open(OUT / "stress.log", "w") as log:
            server = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=log)
        try:
            assert server.stdout.readline()
            wanted = {
                (prompt, tokens): answer(models[0], prompt, tokens)[0] for prompt in PROMPTS for tokens in (20, 120)
            }
            others = collections.Counter()
            end = time.monotonic() + 60 * MINUTES
            with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
                clients = [pool.submit(client, seed, models, wanted, others, end) for seed in range(CLIENTS)]
                seen = sum((c.result() for c in clients), collections.Counter())
            gaps = [(gap(models[0], *of), times) for of, times in others.items()]
            seen["rounded otherwise"] = sum(times for g, times in gaps if g <= CLOSE)
            seen["WRONG"] = sum(times for g, times in gaps if g > CLOSE)
        finally:
            server.terminate()
            code = server.wait()
    worst = max((g for g, _ in gaps), default=0.0)
    print(f"{MINUTES:g} minutes of {CLIENTS} clients: {dict(seen)}; {len(others)} texts beside the quiet ones, whose tokens "
          f"are at most {worst:.3f} nats less likely; the server ended with {code}")
    result = {"minutes": MINUTES, "clients": CLIENTS, **seen, "others": len(others), "nats": worst, "exit": code}
    (OUT / "gpu-stress.json").write_text(json.dumps(result))
    sys.exit(bool(seen["WRONG"] or code))


main()
