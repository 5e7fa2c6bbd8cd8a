"""What the server has to show on a GPU machine: the same text as `run`, whoever else asks; budgets that hold; what
HTTP costs beside `run`.

    python3 scripts/gpu_serve.py PROGRAMS OUT

PROGRAMS is a folder with tierstream, tierstream-synth and ggml's libraries, as for gpu-check.sh. Needs 20 GB of
TMPDIR. All figures go to OUT/gpu-serve.json; exits with 1 if a check has failed.
"""

import concurrent.futures
import contextlib
import http.client
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

PROGRAMS, OUT = (pathlib.Path(argument).resolve() for argument in sys.argv[1:3])
ENVIRONMENT = {**os.environ, "PATH": f"{PROGRAMS}:{os.environ['PATH']}"}
HOST = "127.0.0.1:11561"
PROMPT = "It was a cold evening in November, and the old gentleman sat by the fire,"
OTHERS = ["The sea was calm that night, and", "Sir, said the captain,", "My dear Elizabeth,"]
MIB = 1 << 20
told, failed = [], []


def tell(name, good, **figures):
    told.append({"name": name, "good": good, **figures})
    print(f"{'ok  ' if good else 'FAIL'} {name}: {figures}", flush=True)
    if not good:
        failed.append(name)


def program(*arguments, **kinds):
    return subprocess.run(["tierstream", *map(str, arguments)], env=ENVIRONMENT, check=True, text=True, **kinds)


def gpu_mib():
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.run(query, check=True, capture_output=True, text=True).stdout.split()[0])


def ask(path, body=None):
    connection = http.client.HTTPConnection(HOST, timeout=300)
    connection.request("GET" if body is None else "POST", path, body and json.dumps(body))
    answer = connection.getresponse()
    text = answer.read().decode()
    return json.loads(text) if answer.headers["content-type"].startswith("application/json") else text


@contextlib.contextmanager
def serving(*flags):
    command = ["tierstream", "serve", "--host", HOST, "--json", "--gpu", "0", *map(str, flags)]
    with open(OUT / "serve.log", "a") as log:
        server = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=log)
    try:
        # Its first words are that it listens.
        assert server.stdout.readline()
        yield server
    finally:
        server.terminate()
        server.wait()


def generate(prompt, model="demo", tokens=200):
    options = {"temperature": 0, "num_predict": tokens}
    return ask("/api/generate", {"model": model, "prompt": prompt, "raw": True, "stream": False, "options": options})


def same_text():
    run = ["run", "demo", PROMPT, "-n", "200", "--temp", "0", "--gpu", "0", "--json"]
    wanted = json.loads(program(*run, capture_output=True).stdout)["text"]
    for flags in [[], ["--experts", "25%"], ["--experts", "25%", "--ram", "0"]]:
        with serving("--parallel", "4", *flags):
            alone = generate(PROMPT)["response"]
            with concurrent.futures.ThreadPoolExecutor() as pool:
                first, *_ = pool.map(generate, [PROMPT, *OTHERS])
            text = first["response"]
            # Several sequences in a batch are rounded otherwise than one, where all experts are resident.
            good = alone == wanted and (text == wanted or not flags)
            tell(f"the same text as run, {flags}", good, alone=alone == wanted, beside_others=text == wanted)


def kept_prompts():
    with serving("--parallel", "1", "--experts", "50%"):
        first = generate(PROMPT * 4)
        generate(OTHERS[0] * 8)
        again = generate(PROMPT * 4)
        cached = ask("/metrics").split("tierstream_prompt_tokens_cached_total ")
        tell(
            "a prompt that lost its sequence comes back",
            first["response"] == again["response"],
            prompt_ms=(first["prompt_eval_duration"] // 10**6, again["prompt_eval_duration"] // 10**6),
            cached=cached[1].split()[0] if len(cached) > 1 else None,
        )


def leaving():
    with serving("--parallel", "1", "--experts", "25%"):
        generate(PROMPT, tokens=8)
        connection = http.client.HTTPConnection(HOST)
        options = {"temperature": 0, "num_predict": 3000}
        connection.request("POST", "/api/generate", json.dumps({"model": "demo", "prompt": PROMPT, "options": options}))
        connection.getresponse().read(200)
        connection.sock.close() if connection.sock else None
        connection.close()
        start = time.perf_counter()
        generate("And", tokens=1)
        free = time.perf_counter() - start
        tell("a client that left leaves its sequence", free < 1, seconds=round(free, 4))


def completion(model, tokens):
    """Seconds that a completion takes: the prompt is ids, and no text comes, because the model has no words."""
    start = time.perf_counter()
    answer = ask("/v1/completions", {"model": model, "prompt": list(range(100, 228)), "max_tokens": tokens, "temperature": 0})
    assert answer["usage"]["completion_tokens"] == tokens, answer
    return time.perf_counter() - start


def rates():
    """Of `run` and of the server, in turns."""
    run = ["run", "demo", PROMPT, "-n", "400", "--temp", "0", "--gpu", "0", "--json"]
    ratios, of_run = [], []
    with serving("--parallel", "1"):
        generate(PROMPT, tokens=400)
        for _ in range(7):
            of_run.append(json.loads(program(*run, capture_output=True).stdout)["tok_s"])
            answer = generate(PROMPT, tokens=400)
            ratios.append(answer["eval_count"] / answer["eval_duration"] * 1e9 / of_run[-1])
    tell("tokens per second beside run", True, run=round(statistics.median(of_run)),
         ratio=round(statistics.median(ratios), 3), ratios=[round(ratio, 3) for ratio in ratios])


def synth(model, shape):
    command = ["tierstream-synth", *shape.split(), "--out", model]
    subprocess.run(command, env=ENVIRONMENT, check=True, stdout=subprocess.DEVNULL)
    return model


def large(folder):
    # The shape of Qwen3-30B-A3B, and one of which half of the budget would hold all.
    q30 = synth(folder / "q30.gguf", "qwen3moe --big --layers 48 --experts 128 --used 6 --embd 2048 --ff 768 "
                "--vocab 32000 --type q4_k_m")
    q4 = synth(folder / "q4.gguf", "qwen3moe --big --size 4GB --type q4_k_m")
    before = gpu_mib()
    with serving(q30, q4, "--vram", "8GiB", "--ram", "12GiB", "--max-models", "3", "--parallel", "4", "--ctx", "2048"):
        # A driver's context is no model's.
        context = 700

        def holds(name, *expected):
            loaded = ask("/api/ps")["models"]
            names = sorted(model["name"] for model in loaded)
            used = gpu_mib() - before
            good = names == sorted(expected) and used <= 8 * 1024 + context
            tell(name, good, loaded=names, mib=used, told_mib=[model["size_vram"] // MIB for model in loaded])

        alone = [127 / (completion("q30", 128) - completion("q30", 1)) for _ in range(4)]
        start = time.perf_counter()
        with concurrent.futures.ThreadPoolExecutor() as pool:
            list(pool.map(lambda _: completion("q30", 64), range(4)))
        four = 256 / (time.perf_counter() - start)
        tell("30B in 8 GiB", True, tok_s_of_one=[round(rate, 1) for rate in alone], tok_s_of_four=round(four, 1))
        holds("the budget holds", "q30")
        completion("q4", 1)
        holds("another one takes its place", "q4")
        generate("And", tokens=4)
        holds("a small one stands beside it", "q4", "demo")
        seconds = completion("q30", 1)
        holds(f"and back in {seconds:.1f} s", "q30")
        ask("/api/generate", {"model": "q30", "keep_alive": 0})
        holds("unloaded")


def main():
    for part in [same_text, kept_prompts, leaving, rates]:
        part()
    with tempfile.TemporaryDirectory() as folder:
        large(pathlib.Path(folder))
    (OUT / "gpu-serve.json").write_text(json.dumps(told, indent=1))
    sys.exit(bool(failed))


main()
