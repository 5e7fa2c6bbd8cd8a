"""Compares what we load with what the `safetensors` package of PyPI has written.

A checkpoint of one file and a sharded one, of all types that NumPy has, and one file of the types that
it lacks: names, types, shapes, metadata, and the CRC-32 of every tensor's bytes have to be the same,
loaded into memory of our own and into the caller's, by every engine.

`./x oracle` makes the virtual environment, builds what is needed and runs this.
"""

import json
import pathlib
import subprocess
import sys
import tempfile
import zlib

import numpy
import safetensors
import safetensors.numpy

from paths import EXAMPLES, TARGET

ENGINES = ["uring", "pread", "buffered"]
SHAPES = [(), (1,), (0,), (3, 5), (2, 0, 4), (7, 1, 300), (400, 1001)]

# What the package calls them when it writes bytes that are no array, and what it names them in the
# file; with the size of an element in bits.
NOT_IN_NUMPY = {
    "bfloat16": ("BF16", 16),
    "float8_e4m3fn": ("F8_E4M3", 8),
    "float8_e5m2": ("F8_E5M2", 8),
    "float8_e8m0fnu": ("F8_E8M0", 8),
    "float8_e4m3fnuz": ("F8_E4M3FNUZ", 8),
    "float8_e5m2fnuz": ("F8_E5M2FNUZ", 8),
    "float4_e2m1fn_x2": ("F4", 4),
}


def arrays(random):
    """Name and array, of every type that NumPy has, in every shape."""
    for code, dtype in safetensors.numpy._TYPES.items():
        for number, shape in enumerate(SHAPES):
            count = int(numpy.prod(shape))
            item = numpy.dtype(dtype).itemsize
            # Any bits, NaN and all; a boolean is 0 or 1.
            values = random.integers(0, 2 if code == "BOOL" else 256, count * item, numpy.uint8)
            yield f"{code}.{number} é\n", values.view(dtype).reshape(shape)


def of_array(array):
    codes = {numpy.dtype(dtype): code for code, dtype in safetensors.numpy._TYPES.items()}
    return codes[array.dtype], list(array.shape), zlib.crc32(array.tobytes())


def compare(name, path, expected, metadata):
    """Prints a line for each engine; returns whether nothing differs."""
    good = True
    for engine in ENGINES:
        run = [EXAMPLES / "checksums", path, engine]
        head, *lines = subprocess.run(run, check=True, stdout=subprocess.PIPE).stdout.splitlines()
        ours = {}
        for line in map(json.loads, lines):
            sums = {line["own"], line["given"]}
            ours[line["name"]] = (line["dtype"], line["shape"], *sums)
        different = [key for key in ours.keys() | expected.keys() if ours.get(key) != expected.get(key)]
        same_metadata = json.loads(head) == metadata
        ok = not different and same_metadata and len(lines) == len(expected)
        good &= ok
        print(f"{'ok  ' if ok else 'FAIL'} {name}, {engine}: {len(lines)} tensors")
        for key in different[:10]:
            print(f"     {key!r}: ours {ours.get(key)}, theirs {expected.get(key)}")
        if not same_metadata:
            print(f"     metadata: ours {head}, theirs {metadata}")
    return good


def single(folder, tensors):
    folder.mkdir()
    metadata = {"format": "np", "": "é\n"}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata)
    return compare("one file", folder, {k: of_array(v) for k, v in tensors.items()}, [metadata])


def sharded(folder, tensors):
    folder.mkdir()
    names = list(tensors)
    weight_map = {}
    for shard in range(3):
        file = f"model-{shard + 1:05}-of-00003.safetensors"
        part = {name: tensors[name] for name in names[shard::3]}
        safetensors.numpy.save_file(part, folder / file, {"shard": str(shard)})
        weight_map.update(dict.fromkeys(part, file))
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    metadata = [{"shard": str(shard)} for shard in range(3)]
    return compare("three files", folder, {k: of_array(v) for k, v in tensors.items()}, metadata)


def other_types(folder, random):
    folder.mkdir()
    specs, expected, keep = {}, {}, []
    for name, (code, bits) in NOT_IN_NUMPY.items():
        data = random.integers(0, 256, 6 * 1000 * bits // 8, numpy.uint8)
        keep.append(data)
        # The package counts the last dimension of a packed type in bytes.
        shape = [6, 1000 * bits // 8] if bits < 8 else [6, 1000]
        specs[name] = safetensors.TensorSpec(
            dtype=name, shape=shape, data_ptr=data.ctypes.data, data_len=data.nbytes
        )
        expected[name] = (code, [6, 1000], zlib.crc32(data.tobytes()))
    safetensors.serialize_file(specs, folder / "only.safetensors", None)
    return compare("types that NumPy lacks", folder, expected, [{}])


def main():
    random = numpy.random.default_rng(7)
    tensors = dict(arrays(random))
    # Not the system's folder for temporary files, which may lie in memory.
    with tempfile.TemporaryDirectory(dir=TARGET) as folder:
        folder = pathlib.Path(folder)
        good = single(folder / "single", tensors)
        good &= sharded(folder / "sharded", tensors)
        good &= other_types(folder / "other", random)
    sys.exit(0 if good else 1)


main()
