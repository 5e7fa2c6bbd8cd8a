"""Compares our embeddings with those of `llama-cpp-python`, as `oracle.py` does runs: of models that write
text, the state after the last token, and of encoders, which are made here with random weights, one for each
way in which their tokens become one.

`./x oracle` makes the virtual environment, builds what is needed and runs this.
"""

import json
import pathlib
import subprocess
import sys
import tempfile

import gguf
import numpy

from paths import DEMO, EXAMPLES
from theirs import Theirs, smollm

TOLERANCE = 1e-3
TEXTS = ["the old house by the sea", "sea", "a b c d e the the the old old house"]
WORDS = ["the", "old", "house", "by", "sea", "a", "b", "c", "d", "e"]


def encoder(path, pooling):
    """A small BERT."""
    n_embd, n_ff, n_layer, n_head, n_ctx = 64, 128, 2, 4, 256
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *("\u2581" + word for word in WORDS)]
    writer = gguf.GGUFWriter(path, "bert")
    writer.add_context_length(n_ctx)
    writer.add_embedding_length(n_embd)
    writer.add_feed_forward_length(n_ff)
    writer.add_block_count(n_layer)
    writer.add_head_count(n_head)
    writer.add_layer_norm_eps(1e-12)
    writer.add_causal_attention(False)
    writer.add_pooling_type(pooling)
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 4 + [1] * len(WORDS))
    writer.add_token_type_count(2)
    for add, token in [
        (writer.add_pad_token_id, 0),
        (writer.add_unk_token_id, 1),
        (writer.add_bos_token_id, 2),
        (writer.add_eos_token_id, 3),
        (writer.add_sep_token_id, 3),
    ]:
        add(token)
    random = numpy.random.default_rng(7)

    def tensor(name, *shape):
        writer.add_tensor(name, random.normal(0, 0.2, shape).astype(numpy.float32))

    def norm(name):
        writer.add_tensor(name + ".weight", random.uniform(0.5, 1.5, n_embd).astype(numpy.float32))
        tensor(name + ".bias", n_embd)

    tensor("token_embd.weight", len(tokens), n_embd)
    tensor("token_types.weight", 2, n_embd)
    tensor("position_embd.weight", n_ctx, n_embd)
    norm("token_embd_norm")
    for layer in range(n_layer):
        block = f"blk.{layer}."
        for part in ["attn_q", "attn_k", "attn_v", "attn_output"]:
            tensor(f"{block}{part}.weight", n_embd, n_embd)
            tensor(f"{block}{part}.bias", n_embd)
        for part, rows, columns in [("ffn_up", n_ff, n_embd), ("ffn_down", n_embd, n_ff)]:
            tensor(f"{block}{part}.weight", rows, columns)
            tensor(f"{block}{part}.bias", rows)
        norm(f"{block}attn_output_norm")
        norm(f"{block}layer_output_norm")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def ours(path):
    """Ids and embedding of each text."""
    run = subprocess.run(
        [EXAMPLES / "embeddings", path, *TEXTS], check=True, stdout=subprocess.PIPE
    )
    return [json.loads(line) for line in run.stdout.splitlines()]


def compare(name, path, our_path):
    """Prints one line; returns whether all embeddings are the same."""
    theirs, worst, seen = Theirs(path), 0.0, []
    for text in ours(our_path):
        expected = theirs.embed(text["tokens"])
        mine = numpy.array(text["embedding"])
        assert mine.shape == expected.shape, f"{mine.shape}, {expected.shape}"
        worst = numpy.maximum(worst, numpy.abs(mine - expected).max())
        seen.append(mine)
    # Else the comparison would be of nothing.
    assert all(numpy.abs(seen[0] - other).max() > 100 * TOLERANCE for other in seen[1:])
    ok = worst <= TOLERANCE
    print(f"{'ok  ' if ok else 'FAIL'} {name}, embeddings: largest difference {worst:.1e}")
    return ok


def main():
    good = compare("demo", DEMO, "demo")
    good &= compare("smollm2-135m", smollm(), smollm())
    with tempfile.TemporaryDirectory() as folder:
        for name, pooling in [("mean", gguf.PoolingType.MEAN), ("cls", gguf.PoolingType.CLS)]:
            path = pathlib.Path(folder) / f"{name}.gguf"
            encoder(path, pooling)
            good &= compare(f"encoder, {name}", path, path)
    sys.exit(0 if good else 1)


main()
