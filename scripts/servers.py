"""Starts servers: one of scripted models, and the program itself."""

import contextlib
import itertools
import json
import struct
import subprocess
import urllib.request

from paths import EXAMPLES, TARGET

# Knows tools.
TOOLS = """\
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
{% endif -%}"""

# Knows thinking, too.
TEMPLATE = TOOLS.removesuffix("{% endif -%}") + """\
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


def gguf_key(key, value):
    """A key of a GGUF's header: its value is a text, or a number of 32 bits."""
    text = lambda text: struct.pack("<Q", len(text.encode())) + text.encode()
    kind = struct.pack("<I", 8) + text(value) if isinstance(value, str) else struct.pack("<II", 4, value)
    return text(key) + kind


def write_model(path, keys):
    """Writes a GGUF of a header alone."""
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, len(keys))
    path.write_bytes(head + b"".join(gguf_key(*one) for one in keys.items()))


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
        with urllib.request.urlopen(self.url + "/metrics") as answer:
            lines = answer.read().decode().splitlines()
        for line in lines:
            if line.startswith(name + " "):
                return float(line.split()[1])
        raise KeyError(name)


@contextlib.contextmanager
def scripted(folder, **options):
    """A server of the models in `folder`. Options are those of crates/server/examples/scripted.rs."""
    arguments = [f"{name}={value}" for name, value in options.items()]
    pipe = subprocess.PIPE
    with subprocess.Popen([EXAMPLES / "scripted", folder, *arguments], stdin=pipe, stdout=pipe, text=True) as process:
        try:
            yield Server(process.stdout.readline().strip(), process)
        finally:
            process.kill()


@contextlib.contextmanager
def program(*flags, env=None):
    """`tierstream serve`, on a port that the system chooses."""
    command = [TARGET / "release/tierstream", "serve", "--host", "127.0.0.1:0", "--json", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
        try:
            # One object over several lines.
            told = itertools.takewhile(lambda line: line != "}\n", process.stdout)
            yield Server(json.loads("".join(told) + "}")["url"], process)
        finally:
            process.kill()
