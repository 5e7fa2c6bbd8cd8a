"""Writes the tables that tests/oracle.rs compares this crate with, as another reader sees them.

The other reader is the `gguf` package of PyPI (made with version 0.19.0), by the authors of the format. To regenerate:

    python3 -m venv /tmp/gguf-oracle
    /tmp/gguf-oracle/bin/pip install gguf==0.19.0
    /tmp/gguf-oracle/bin/python crates/gguf/tests/oracle.py

It writes, into tests/data/ beside this file:

    tensor_types.txt                one line per tensor type: number, name, elements and bytes of a block
    novelist-moe-31m-q4_0.txt       one line per tensor of models/novelist-moe-31m-q4_0.gguf, in file order, in the
                                    format of `cargo run -p tierstream-gguf --example dump`
"""

import json
from pathlib import Path

from gguf import GGUFReader
from gguf.constants import GGML_QUANT_SIZES

HERE = Path(__file__).resolve().parent
MODEL = "novelist-moe-31m-q4_0"


def tensor_types():
    for quant, (elems, size) in sorted(GGML_QUANT_SIZES.items()):
        yield f"{int(quant)} {quant.name} {elems} {size}"


def tensors(path):
    for tensor in GGUFReader(path).tensors:
        line = {
            "name": tensor.name,
            "type": tensor.tensor_type.name,
            "dims": [int(dim) for dim in tensor.shape],
            "offset": int(tensor.data_offset),
            "len": int(tensor.n_bytes),
        }
        yield json.dumps(line, separators=(",", ":"))


def write(name, lines):
    (HERE / "data" / name).write_text("".join(line + "\n" for line in lines))


write("tensor_types.txt", tensor_types())
write(f"{MODEL}.txt", tensors(HERE / f"../../../models/{MODEL}.gguf"))
