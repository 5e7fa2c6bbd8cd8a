"""Compares the prompts that we render with those of jinja2, set up as transformers does it
(`transformers/utils/chat_template_utils.py`).

Templates in the style of model families, over chats with everything that they may have in them; then
templates, expressions, values and dates that a seeded generator makes up. Every text has to be the same to
the byte, and where one side refuses, so does the other.

`./x oracle chat` makes the virtual environment, builds what is needed and runs this. `--cases N` makes up so
many of each kind, `--seed N` others.
"""

import argparse
import datetime
import json
import random
import subprocess
import sys

import jinja2
import jinja2.ext
import jinja2.sandbox

import oracle_chat_cases as made_up
from paths import EXAMPLES, ROOT

TEMPLATES = ROOT / "crates/chat/tests/templates"
NOW = 1795775611

# What templates want otherwise than most, which we find out by trying.
SHAPES = {
    "deepseek-r1.jinja": {"arguments": "text"},
    "gemma2.jinja": {"system": False},
    "gemma3.jinja": {"typed": True},
}


def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def raise_exception(message):
    raise jinja2.exceptions.TemplateError(message)


def environment(now):
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    moment = datetime.datetime.fromtimestamp(now, datetime.UTC)
    env.globals["strftime_now"] = moment.strftime
    return env


def as_transformers_has_it(message, shape):
    """A message in the shape that OpenAI's API and transformers give it."""
    content = message.get("content", "")
    if shape.get("typed"):
        content = [{"type": "text", "text": content}]
    out = {"role": message["role"], "content": content}
    if "thinking" in message:
        out["reasoning_content"] = out["thinking"] = message["thinking"]
    calls = []
    for call in message.get("tool_calls", []):
        arguments = call["arguments"]
        if shape.get("arguments") == "text":
            arguments = json.dumps(arguments, ensure_ascii=False)
        function = {"name": call["name"], "arguments": arguments}
        id = {"id": call["id"]} if call.get("id") else {}
        calls.append({"type": "function", **id, "function": function})
    if calls:
        out["tool_calls"] = calls
    for ours, theirs in [("tool_call_id", "tool_call_id"), ("tool_name", "name")]:
        if ours in message:
            out[theirs] = message[ours]
    return out


def without_system(messages):
    """System messages go before the first user message, where the template takes none."""
    system = "".join(m["content"] + "\n\n" for m in messages if m["role"] == "system")
    rest = [dict(m) for m in messages if m["role"] != "system"]
    for message in rest:
        if message["role"] == "user":
            message["content"] = system + message["content"]
            return rest
    return [*rest, {"role": "user", "content": system.rstrip()}] if system else rest


def theirs(case):
    shape = case.get("shape", {})
    messages = case["messages"]
    if not shape.get("system", True):
        messages = without_system(messages)
    flags = {}
    if case.get("think"):
        flags["enable_thinking"] = flags["thinking"] = case["think"] != "off"
        if case["think"] in ("low", "medium", "high"):
            flags["reasoning_effort"] = case["think"]
    try:
        template = environment(case.get("now", NOW)).from_string(case["template"])
        return {
            "text": template.render(
                messages=[as_transformers_has_it(m, shape) for m in messages],
                tools=case.get("tools") or None,
                documents=None,
                add_generation_prompt=case.get("add_generation_prompt", False),
                bos_token=case.get("bos", ""),
                eos_token=case.get("eos", ""),
                **flags,
            )
        }
    except Exception as error:  # Whatever a template's Python raises is a refusal.
        return {"error": f"{type(error).__name__}: {error}"}


def ours(cases):
    lines = "".join(json.dumps({"now": NOW, **case}) + "\n" for case in cases)
    run = [EXAMPLES / "render"]
    told = subprocess.run(run, input=lines.encode(), check=True, stdout=subprocess.PIPE).stdout
    return [json.loads(line) for line in told.decode().split("\n") if line]


def families():
    for path in sorted(TEMPLATES.glob("*.jinja")):
        for case in made_up.chats():
            shape = SHAPES.get(path.name, {})
            yield {"template": path.read_text(), "bos": "<s>", "eos": "</s>", "shape": shape, **case}


def compare(name, cases, shown):
    """Prints a line for each kind of case; returns whether nothing differs."""
    cases = list(cases)
    different, refused = [], 0
    for case, our, their in zip(cases, ours(cases), map(theirs, cases), strict=True):
        refused += "error" in their
        if our.get("text") != their.get("text"):
            different.append((case, our, their))
    print(f"{'FAIL' if different else 'ok  '} {name}: {len(cases)} cases, {refused} of them refused", end="")
    print(f", {len(different)} differ" if different else "")
    for case, our, their in different[:shown]:
        print(f"     template {case['template'] if len(case['template']) < 400 else case['template'][:60]!r}")
        print(f"       ours   {our}\n       theirs {their}")
    return not different


def main():
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--cases", type=int, default=1000)
    arguments.add_argument("--seed", type=int, default=7)
    arguments.add_argument("--shown", type=int, default=10)
    arguments = arguments.parse_args()
    good = compare("templates of families", families(), arguments.shown)
    good &= compare("features", made_up.features(), arguments.shown)
    for name, make in made_up.KINDS.items():
        choose = random.Random(f"{name} {arguments.seed}")
        good &= compare(name, (make(choose) for _ in range(arguments.cases)), arguments.shown)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
