"""llama.cpp's server, from PyPI's `xllamacpp`, as a program: llama_server.py MODEL NAME PARALLEL CTX THREADS
[embeddings|stock]. Prints where it listens, and ends with its standard input."""

import sys

import xllamacpp

path, name, parallel, ctx, threads, *mode = sys.argv[1:]
params = xllamacpp.CommonParams()
params.model.path = path
params.model_alias = {name}
params.n_parallel = int(parallel)
# Of each sequence, as ours.
params.n_ctx = int(ctx) * int(parallel)
params.kv_unified = False
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(threads)
params.n_batch = params.n_ubatch = 512
# The kernels that ours has, unless it is to be as fast as it is by itself: weights are not repacked.
params.no_extra_bufts = mode != ["stock"]
# A prompt is computed from where a sequence's last one differs, and not from an earlier one.
params.cache_ram_mib = 0
params.fit_params = False
if mode == ["embeddings"]:
    params.embedding = True
    # Ours of a model that writes text.
    params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_LAST
params.endpoint_metrics = params.endpoint_props = True
params.port, params.verbosity = 0, 0
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()
