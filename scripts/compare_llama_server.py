"""Compares the server with llama.cpp's own, from PyPI's `xllamacpp`: the same file, the same flags, the same requests.

    ./x oracle server                                                         what is the same, what differs
    target/llama-server/bin/python scripts/compare_llama_server.py --speed    how fast both are, by turns

Each server has one compute thread, and weights that are not repacked, but for `--speed`, which has llama.cpp's both
ways: as it is, and with the kernels that ours has. Texts at temperature 0 have to be the same,
and whatever else compare_llama_cases.py does not know to differ, with its reason; what it says to differ has to.
The model is the demo model under a chat template that knows tools.
"""

import argparse
import contextlib
import http.client
import json
import os
import pathlib
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse

import servers
from compare_llama_cases import MODEL, NOVEL, Answer, cases, embedded
from paths import DEMO

CTX, THREADS = 512, 1


@contextlib.contextmanager
def theirs(model, parallel, *mode):
    """llama.cpp's server."""
    program = pathlib.Path(__file__).with_name("llama_server.py")
    command = [sys.executable, program, model, MODEL, str(parallel), str(CTX), str(THREADS), *mode]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            yield servers.Server(process.stdout.readline().strip(), process)
        finally:
            process.kill()


def ours(model, parallel):
    """`tierstream serve` with the same."""
    flags = [model, "--parallel", str(parallel), "--ctx", str(CTX), "--threads", str(THREADS),
             "--prompt-cache", "0"]
    # A home of its own: no other models, no settings.
    environment = {"HOME": str(model.parent), "PATH": os.environ["PATH"]}
    return servers.program(*flags, env=environment)


def templated(folder):
    """The demo model with a chat template, which it lacks."""
    data = DEMO.read_bytes()
    head = struct.Struct("<4sIQQ")
    magic, version, tensors, keys = head.unpack_from(data)
    # The weights are aligned: a comment fills the new key up, so that they stay it.
    key = lambda fill: servers.gguf_key("tokenizer.chat_template", servers.TOOLS + "{#" + fill * " " + "#}")
    fill = -len(key(0)) % 32
    path = folder / f"{MODEL}.gguf"
    path.write_bytes(head.pack(magic, version, tensors, keys + 1) + key(fill) + data[head.size:])
    return path


def connect(url):
    return http.client.HTTPConnection(urllib.parse.urlsplit(url).netloc, timeout=60)


def send(url, path, body):
    """Sends a request; the connection, on which its answer comes."""
    connection = connect(url)
    if body is None:
        connection.request("GET", path)
    else:
        data = body if isinstance(body, str) else json.dumps(body)
        connection.request("POST", path, data, {"Content-Type": "application/json"})
    return connection


def forget(url, parallel):
    """Has all sequences hold something else: what is computed together rounds differently than by itself, so that
    a prompt of which a sequence holds more with one server than with the other could be gone on with otherwise."""
    for number in range(parallel):
        body = {"model": MODEL, "prompt": [100 + number, 200], "max_tokens": 1}
        send(url, "/v1/completions", body).getresponse().read()


def ask(url, case):
    """What is compared of the answer, and the answer."""
    response = send(url, case.path, case.body).getresponse()
    text = response.read().decode()
    answer = Answer(response.status, response.headers.get("Content-Type", ""), text)
    try:
        return case.pick(answer), answer
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        return f"{answer.status} {text}", answer


def is_same(one, other, tolerance):
    if isinstance(one, float) or isinstance(other, float):
        is_number = all(isinstance(value, (int, float)) for value in (one, other))
        return is_number and abs(one - other) <= tolerance
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(is_same(one[key], other[key], tolerance) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(is_same(*pair, tolerance) for pair in zip(one, other))
    return one == other


def short(value):
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 400 else text[:400] + f"... ({len(text)})"


def compare(our_url, their_url, parallel, all_cases, verbose):
    """Prints a line for each case, and both answers where they differ; how many are not as they should be."""
    wrong = 0
    for case in all_cases:
        if parallel:
            forget(our_url, parallel)
            forget(their_url, parallel)
        (mine, my_answer), (other, their_answer) = ask(our_url, case), ask(their_url, case)
        same = is_same(mine, other, case.tolerance)
        is_wrong = same == bool(case.why)
        wrong += is_wrong
        print(f"{'FAIL' if is_wrong else 'ok  '} {'same   ' if same else 'differs'}  {case.name}"
              + (f": {case.why}" if case.why else ""))
        if verbose or is_wrong:
            print(f"     ours   {short(mine)}\n     theirs {short(other)}")
        if is_wrong and not same:
            print(f"     asked  {case.path} {short(case.body)}\n"
                  f"     whole  {short(my_answer.text)}\n     whole  {short(their_answer.text)}")
    return wrong


def compare_all(model, verbose):
    wrong = 0
    for parallel in (1, 4):
        print(f"-- {parallel} at a time", flush=True)
        with ours(model, parallel) as mine, theirs(model, parallel) as other:
            wrong += compare(mine.url, other.url, parallel, cases(), verbose)
    print("-- embeddings", flush=True)
    with ours(model, 1) as mine, theirs(model, 1, "embeddings") as other:
        wrong += compare(mine.url, other.url, 0, embedded(), verbose)
    return wrong


def stream(url, prompt, tokens):
    """Tokens per second after the first one, and seconds to the first byte and to the first token."""
    body = {"model": MODEL, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True, "seed": 1,
            "stream_options": {"include_usage": True}}
    start = time.perf_counter()
    response = send(url, "/v1/completions", body).getresponse()
    first_byte, times, counted = time.perf_counter() - start, [], 0
    for line in response:
        if line.startswith(b"data: {"):
            event = json.loads(line[6:])
            counted = (event.get("usage") or {}).get("completion_tokens", counted)
            if any(choice["text"] for choice in event["choices"]):
                times.append(time.perf_counter())
    return (counted - 1) / (times[-1] - times[0]), first_byte, times[0] - start


def queued(url, clients):
    """Seconds to the first byte and to the first token, of each of so many that come at once."""
    told = [None] * clients

    def client(number):
        told[number] = stream(url, f"Chapter {number}. {NOVEL}", 100)[1:]

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [sorted(times) for times in zip(*told)]


def cpu_seconds(server):
    """What a server has computed for, all threads together."""
    fields = pathlib.Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(model, rounds, tokens):
    print("load average", os.getloadavg())
    with ours(model, 1) as mine, theirs(model, 1, "stock") as stock, theirs(model, 1) as same:
        all_ = {"ours": mine, "llama.cpp": stock, "llama.cpp, not repacked": same}
        for server in all_.values():
            stream(server.url, NOVEL, tokens)
        told = {}
        for number in range(rounds):
            # Either is first in every other round.
            order = list(all_)[:: 1 if number % 2 else -1]
            rates, cpu = {}, {}
            for name in order:
                before = cpu_seconds(all_[name])
                rates[name] = stream(all_[name].url, NOVEL, tokens)[0]
                cpu[name] = cpu_seconds(all_[name]) - before
            waits = {name: queued(all_[name].url, 5) for name in order}
            for name in all_:
                bytes_, tokens_ = ([round(1e3 * x, 1) for x in times] for times in waits[name])
                print(f"round {number + 1}, {name}: {rates[name]:.0f} tok/s, {cpu[name]:.2f} s of CPU time; five at "
                      f"once, ms: first bytes {bytes_}, first tokens {tokens_}", flush=True)
            last = {name: times[1][-1] for name, times in waits.items()}
            for figure, of in [("tokens/s", rates), ("CPU time", cpu), ("first token of the last of five", last)]:
                for name in list(all_)[1:]:
                    told.setdefault(f"{figure}, ours over {name}", []).append(of["ours"] / of[name])
    for name, ratios in told.items():
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        print(f"{name}: median {spread} of {rounds} rounds")


def main():
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--speed", action="store_true")
    flags.add_argument("--rounds", type=int, default=5)
    flags.add_argument("--tokens", type=int, default=400)
    flags.add_argument("--verbose", action="store_true", help="both answers of all cases")
    args = flags.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = templated(pathlib.Path(folder))
        if args.speed:
            return measure(model, args.rounds, args.tokens)
        wrong = compare_all(model, args.verbose)
    print(f"{wrong} are not as they should be")
    sys.exit(1 if wrong else 0)


main()
