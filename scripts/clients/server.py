"""Servers for the tests: one of scripted models, and the program itself."""

import contextlib
import hashlib
import json
import os
import pathlib
import struct
import subprocess

import httpx

ROOT = pathlib.Path(__file__).resolve().parents[2]
TARGET = ROOT / os.environ.get("CARGO_TARGET_DIR", "target")

# Knows tools and thinking.
TEMPLATE = """\
{%- if tools %}<|im_start|>system
You may call:
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}
Answer a call as <tool_call>
{"name": ..., "arguments": ...}
</tool_call><|im_end|>
{% endif -%}
{%- for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}
{%- for call in m.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}{% endif -%}"""

# Knows neither.
PLAIN = """\
{%- for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}"""


def write_model(path, keys):
    """Writes a GGUF of a header alone: its keys are texts, and numbers of 32 bits."""
    text = lambda text: struct.pack("<Q", len(text.encode())) + text.encode()
    parts = [b"GGUF", struct.pack("<IQQ", 3, 0, len(keys))]
    for key, value in keys.items():
        kind = struct.pack("<I", 8) + text(value) if isinstance(value, str) else struct.pack("<II", 4, value)
        parts.append(text(key) + kind)
    path.write_bytes(b"".join(parts))


def write_models(folder):
    """`one` and `two` know tools and thinking, `plain` neither; `fill` fills a gap in a text."""
    named = lambda template: {"general.architecture": "llama", "llama.context_length": 8192,
                              "tokenizer.chat_template": template}
    write_model(folder / "one.gguf", named(TEMPLATE))
    write_model(folder / "two.gguf", named(TEMPLATE))
    write_model(folder / "plain.gguf", named(PLAIN))
    # Any three of the script's control tokens.
    gap = {f"tokenizer.ggml.fim_{name}_token_id": id for name, id in [("pre", 260), ("suf", 261), ("mid", 262)]}
    write_model(folder / "fill.gguf", named(PLAIN) | gap)


class Server:
    """A running server."""

    def __init__(self, url, process):
        self.url = url
        self.v1 = url + "/v1"
        self.process = process

    def tell(self, command):
        """Sends a command to the scripted server, and waits until it is done."""
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == command + "\n"

    def metric(self, name):
        """A value of `/metrics`."""
        for line in httpx.get(self.url + "/metrics").text.splitlines():
            if line.startswith(name + " "):
                return float(line.split()[1])
        raise KeyError(name)


@contextlib.contextmanager
def scripted(folder, **options):
    """A server of the models in `folder`. Options are those of crates/server/examples/scripted.rs."""
    program = TARGET / "release/examples/scripted"
    arguments = [f"{name}={value}" for name, value in options.items()]
    pipe = subprocess.PIPE
    with subprocess.Popen([program, folder, *arguments], stdin=pipe, stdout=pipe, text=True) as process:
        try:
            yield Server(process.stdout.readline().strip(), process)
        finally:
            process.kill()


def write_store(folder):
    """A store as Ollama makes it, with the demo model as `story`, under a template that knows tools."""
    template = """\
{{- if .Tools }}You may call:{{ range .Tools }}
{{ . }}{{ end }}
{{ end }}{{ range .Messages }}{{ .Role }}: {{ .Content }}{{ range .ToolCalls }}<tool_call>
{"name": "{{ .Function.Name }}", "arguments": {{ .Function.Arguments }}}
</tool_call>{{ end }}
{{ end }}assistant: """
    [demo] = (ROOT / "models").glob("*.gguf")
    (folder / "blobs").mkdir(parents=True)

    def layer(kind, content):
        digest = "sha256:" + hashlib.sha256(content).hexdigest()
        (folder / "blobs" / digest.replace(":", "-")).write_bytes(content)
        return {"mediaType": "application/vnd.ollama.image." + kind, "digest": digest, "size": len(content)}

    parts = {"model": demo.read_bytes(), "template": template.encode(), "params": b'{"temperature": 0}'}
    config = layer("config", b"{}") | {"mediaType": "application/vnd.docker.container.image.v1+json"}
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
        "config": config,
        "layers": [layer(kind, content) for kind, content in parts.items()],
    }
    path = folder / "manifests/registry.ollama.ai/library/story/latest"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(manifest))


@contextlib.contextmanager
def program(home):
    """`tierstream serve`, for a user whose home that is: the demo model, and `story`."""
    store = home / "models"
    write_store(store)
    environment = {"HOME": str(home), "PATH": os.environ["PATH"], "OLLAMA_MODELS": str(store)}
    command = [TARGET / "release/tierstream", "serve", "--host", "127.0.0.1:0", "--threads", "1", "--json"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as process:
        try:
            told = iter(process.stdout.readline, "")
            yield Server(next(line for line in told if "http" in line).split('"')[3], process)
        finally:
            process.kill()
