"""Mixed load on a GPU for some minutes: clients with short and long prompts, clients that leave, models that take each
other's place, all with a quarter of their experts in the GPU's memory. Every text must be that of a quiet run.

    python3 scripts/gpu_stress.py PROGRAMS OUT [MINUTES]

PROGRAMS as for gpu-check.sh, with the demo model beside it (models/). Exits with 1 if a text or an answer was another one.
"""

import collections
import concurrent.futures
import http.client
import json
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
TEXT = "It was a cold evening in November, and the old gentleman sat by the fire, "
PROMPTS = ["The sea was calm that night, and", "Sir, said the captain,", TEXT, TEXT * 6, "My dear Elizabeth, " * 40]


def request(model, prompt, tokens, stream):
    options = {"temperature": 0, "num_predict": tokens}
    body = {"model": model, "prompt": prompt, "raw": True, "stream": stream, "options": options}
    connection = http.client.HTTPConnection(HOST, timeout=300)
    connection.request("POST", "/api/generate", json.dumps(body))
    return connection, connection.getresponse()


def answer(model, prompt, tokens):
    connection, response = request(model, prompt, tokens, stream=False)
    text = json.loads(response.read())
    connection.close()
    return text.get("response", text)


def client(seed, models, wanted, end):
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
        elif answer(model, prompt, tokens) == wanted[prompt, tokens]:
            seen["right"] += 1
        else:
            seen["WRONG"] += 1
    return seen


def main():
    with tempfile.TemporaryDirectory() as folder:
        demo = next(path for path in pathlib.Path(os.environ.get("MODELS", "models")).glob("*.gguf"))
        models = [f"stress{n}" for n in range(3)]
        for name in models:
            shutil.copy(demo, pathlib.Path(folder) / f"{name}.gguf")
        files = [str(pathlib.Path(folder) / f"{name}.gguf") for name in models]
        command = ["tierstream", "serve", *files, "--host", HOST, "--json", "--gpu", "0", "--experts", "25%",
                   "--max-models", "2", "--parallel", "2", "--ctx", "1024"]
        with open(OUT / "stress.log", "w") as log:
            server = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=log)
        try:
            assert server.stdout.readline()
            wanted = {(prompt, tokens): answer(models[0], prompt, tokens) for prompt in PROMPTS for tokens in (20, 120)}
            assert all(isinstance(text, str) and text for text in wanted.values()), wanted
            end = time.monotonic() + 60 * MINUTES
            with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
                clients = [pool.submit(client, seed, models, wanted, end) for seed in range(CLIENTS)]
                seen = sum((c.result() for c in clients), collections.Counter())
        finally:
            server.terminate()
            code = server.wait()
    print(f"{MINUTES:g} minutes of {CLIENTS} clients: {dict(seen)}, the server ended with {code}")
    (OUT / "gpu-stress.json").write_text(json.dumps({"minutes": MINUTES, "clients": CLIENTS, **seen, "exit": code}))
    sys.exit(bool(seen["WRONG"] or code))


main()
