"""Loads safetensors files into host memory by a package of PyPI, and prints what that took.

    peers.py versions                 the version of each package, null if it is not installed
    peers.py PACKAGE BYTES FILE...    one load, in this process, which has loaded nothing before; just
                                      before it, so much of the free memory is touched

`tierstream bench load` runs this. Prints one JSON object.
"""

import ctypes
import importlib.metadata
import json
import mmap
import signal
import sys
import time

PACKAGES = ["safetensors", "runai-model-streamer", "fastsafetensors"]

# prctl(2): a signal when the parent ends, who alone wants the result.
PR_SET_PDEATHSIG = 1


def memory(field, path="/proc/self/status"):
    """Bytes of a field of a file of the kernel's."""
    with open(path) as lines:
        line = next(line for line in lines if line.startswith(field + ":"))
    return int(line.split()[1]) << 10


def touch_free_memory(size):
    """As the program's function of this name."""
    size = min(size, memory("MemFree", "/proc/meminfo") // 10 * 9)
    if size:
        with mmap.mmap(-1, size) as pages:
            pages.madvise(mmap.MADV_HUGEPAGE)
            for at in range(0, size, mmap.PAGESIZE):
                pages[at] = 1
        with open("/proc/self/clear_refs", "w") as peak:
            peak.write("5")


def versions():
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def by_safetensors():
    from safetensors.torch import load_file

    def load(files):
        return {name: tensor for file in files for name, tensor in load_file(file).items()}

    return load


def by_runai():
    from runai_model_streamer import SafetensorsStreamer

    def load(files):
        with SafetensorsStreamer() as streamer:
            streamer.stream_files(files)
            return dict(streamer.get_tensors())

    return load


def by_fastsafetensors():
    from fastsafetensors import SafeTensorsFileLoader

    def load(files):
        loader = SafeTensorsFileLoader(None, device="cpu", nogds=True)
        loader.add_filenames({0: files})
        buffers = loader.copy_files_to_device()
        tensors = {name: buffers.get_tensor(name) for name in loader.get_keys()}
        # They are views of the buffers.
        tensors[None] = buffers
        return tensors

    return load


def touch(tensor):
    """Reads a byte of each page: what is mapped is in memory only then. Returns the tensor's bytes."""
    import torch

    tensor = tensor.contiguous().view(-1).view(torch.uint8)
    if tensor.numel():
        tensor[::4096].max()
    return tensor.numel()


def load(package, free, files):
    import torch

    by = dict(zip(PACKAGES, [by_safetensors, by_runai, by_fastsafetensors]))[package]()
    # Once before, so that nothing of it is loaded later.
    touch(torch.zeros(1))
    touch_free_memory(free)
    ready = memory("VmRSS")
    start, cpu = time.perf_counter(), time.process_time()
    tensors = by(files)
    found = sum(touch(tensor) for name, tensor in tensors.items() if name is not None)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return {
        "seconds": seconds,
        "cpu_s": cpu,
        "bytes": found,
        "ready_rss_bytes": ready,
        "peak_rss_bytes": memory("VmHWM"),
    }


if __name__ == "__main__":
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    what, *rest = sys.argv[1:]
    print(json.dumps(versions() if what == "versions" else load(what, int(rest[0]), rest[1:])))
