"""What the server has to show on a GPU machine: the same text as `run`, whoever else asks; budgets that hold; what
HTTP costs beside `bench decode`.

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
    """Seconds of each token of a prompt of ids: the model has no words."""
    connection = http.client.HTTPConnection(HOST, timeout=300)
    body = {"model": model, "prompt": list(range(100, 228)), "max_tokens": tokens, "stream": True, "temperature": 0}
    connection.request("POST", "/v1/completions", json.dumps({**body, "logprobs": 0}))
    return [time.perf_counter() for line in connection.getresponse() if line.startswith(b'data: {"')]


def large(folder):
    model = pathlib.Path(folder) / "q30.gguf"
    shape = "qwen3moe --big --layers 48 --experts 128 --used 6 --embd 2048 --ff 768 --vocab 32000 --type q4_k_m"
    subprocess.run(["tierstream-synth", *shape.split(), "--out", model], env=ENVIRONMENT, check=True, stdout=subprocess.DEVNULL)
    budget = ["--vram", "8GiB", "--ram", "12GiB"]
    before = gpu_mib()
    bench = ["bench", "decode", model, "--gpu", "0", "--json", "--experts", "100%", "--repeats", "1", "-n", "96", "--warmup", "128"]
    rows = json.loads(program(*bench, *budget, capture_output=True).stdout)["rows"]
    alone = rows[0]["tok_s_median"]
    with serving(model, *budget, "--max-models", "2", "--parallel", "4", "--ctx", "2048"):
        rates = []
        for _ in range(4):
            times = completion("q30", 128)
            rates.append((len(times) - 1) / (times[-1] - times[0]))
        tell("30B in 8 GiB, one client", True, tok_s=[round(rate, 1) for rate in rates],
             bench_decode=round(alone, 1), share=round(statistics.median(rates[1:]) / alone, 3))
        start = time.perf_counter()
        with concurrent.futures.ThreadPoolExecutor() as pool:
            counts = [len(times) for times in pool.map(lambda _: completion("q30", 64), range(4))]
        tell("30B in 8 GiB, four clients", min(counts) >= 63, tok_s=round(sum(counts) / (time.perf_counter() - start), 1))
        (loaded,) = ask("/api/ps")["models"]
        used = gpu_mib() - before
        # The driver's context is not the model's.
        tell("the budget of the GPU's memory holds", used <= 8 * 1024 + 700, mib=used,
             told_mib=loaded["size_vram"] // MIB, size_mib=loaded["size"] // MIB)
        generate("And", tokens=4)
        names = [model["name"] for model in ask("/api/ps")["models"]]
        tell("another model takes its place", names == ["demo"], loaded=names, mib=gpu_mib() - before)
        start = time.perf_counter()
        times = completion("q30", 16)
        names = [model["name"] for model in ask("/api/ps")["models"]]
        tell("and back", len(times) >= 15, loaded=names, seconds_to_first=round(times[0] - start, 2))
        ask("/api/generate", {"model": "q30", "keep_alive": 0})
        tell("unloaded", True, mib=gpu_mib() - before)


def main():
    for part in [same_text, kept_prompts, leaving]:
        part()
    with tempfile.TemporaryDirectory() as folder:
        large(folder)
    (OUT / "gpu-serve.json").write_text(json.dumps(told, indent=1))
    sys.exit(bool(failed))


main()
