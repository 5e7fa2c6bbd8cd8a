"""What scripted models are told to say, and what the tests of several clients share."""

import json

WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
CLOCK = {"type": "object", "properties": {}, "additionalProperties": False}

# Two words of three: short answers, whatever the model would say.
COLOURS = {
    "type": "object",
    "properties": {"sky": {"enum": ["blue", "grey"]}, "rains": {"type": "boolean"}},
    "required": ["sky", "rains"],
    "additionalProperties": False,
}


def say(text):
    """A prompt to which a scripted model says just this."""
    return f"SAY[{text}]YAS"


def user(text):
    """A chat to which it says this."""
    return [{"role": "user", "content": say(text)}]


def call(name, **arguments):
    """A call as the template of `one` has it."""
    return f'<tool_call>\n{json.dumps({"name": name, "arguments": arguments})}\n</tool_call>'


def functions():
    """`weather` and `clock`, as OpenAI and Ollama have tools."""
    return [
        {"type": "function", "function": {"name": "weather", "description": "The weather", "parameters": WEATHER}},
        {"type": "function", "function": {"name": "clock", "description": "The time", "parameters": CLOCK}},
    ]


def unit(*counts):
    """The embedding of a text with so many of a, e, i, o and u."""
    length = sum(n * n for n in counts) ** 0.5
    return [n / length for n in counts]


def end_midway(server, stream):
    """Closes a stream of a server of one sequence and with a gate, and has the next request not wait for it."""
    server.tell("reached 1")
    assert server.metric("llamacpp:requests_processing") == 1
    stream.close()
    server.tell("stopped 1")
    server.tell("open 1000000")
