"""What both servers are asked, and what of an answer has to be the same."""

import base64
import dataclasses
import json
import struct
from typing import Any, Callable

MODEL = "novelist"
NOVEL = "It was a cold evening in November, and the old gentleman sat by the fire,"
CODE = "fn main() {\n    let mut total = 0;\n    for i in 0..10 {\n"
GREEDY = {"model": MODEL, "temperature": 0, "max_tokens": 32}
ASK = [{"role": "user", "content": "Who sits by the fire?"}]
SKY = {
    "type": "object",
    "properties": {"sky": {"enum": ["blue", "grey"]}, "rains": {"type": "boolean"}},
    "required": ["sky", "rains"],
    "additionalProperties": False,
}
CITY = {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"],
        "additionalProperties": False}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "The weather", "parameters": CITY}}]


@dataclasses.dataclass
class Answer:
    status: int
    kind: str
    text: str

    def json(self):
        return json.loads(self.text)

    def events(self):
        """The data of all events of a stream, but for its last word."""
        data = [line[6:] for line in self.text.splitlines() if line.startswith("data: ")]
        return [json.loads(one) for one in data if one != "[DONE]"]


@dataclasses.dataclass
class Case:
    name: str
    path: str
    # None: GET. A text is sent as it is.
    body: Any
    # What is compared of an answer.
    pick: Callable[[Answer], Any]
    # Why the two differ. Without one they have to be the same.
    why: str | None = None
    # Of numbers that are computed.
    tolerance: float = 1e-3


# A last bit, which builds round differently, can route to another expert: the most that was seen is 0.036 for the
# logarithm of a probability, and 0.003 for a number of an embedding.
ROUTED = 0.1
EMBEDDED = 0.01

# What is picked.


def usage(answer):
    told = answer.get("usage") or {}
    return [told.get(key) for key in ("prompt_tokens", "completion_tokens", "total_tokens")]


def completion(answer):
    answer = answer.json()
    choices = [{key: choice[key] for key in ("index", "text", "finish_reason")} for choice in answer["choices"]]
    return {"object": answer["object"], "choices": choices, "usage": usage(answer)}


def texts(answer):
    return completion(answer)["choices"]


def completion_stream(answer):
    events = answer.events()
    choices = [choice for event in events for choice in event["choices"]]
    return {
        "kind": answer.kind.partition(";")[0],
        "text": "".join(choice["text"] for choice in choices),
        "ends": [choice["finish_reason"] for choice in choices if choice["finish_reason"]],
        "usage": [usage(event) for event in events if event.get("usage")],
        "done": answer.text.rstrip().endswith("data: [DONE]"),
    }


def chat(answer):
    answer = answer.json()
    [choice] = answer["choices"]
    message = choice["message"]
    return {
        "object": answer["object"],
        "role": message["role"],
        "content": message["content"],
        "reasoning": message.get("reasoning_content"),
        "calls": calls(message.get("tool_calls")),
        "finish_reason": choice["finish_reason"],
        "usage": usage(answer),
    }


def calls(all):
    return [[call["type"], call["function"]["name"], json.loads(call["function"]["arguments"])] for call in all or []]


def chat_stream(answer):
    events = answer.events()
    choices = [choice for event in events for choice in event["choices"]]
    deltas = [choice["delta"] for choice in choices]
    return {
        "kind": answer.kind.partition(";")[0],
        "roles": [delta["role"] for delta in deltas if delta.get("role")],
        "content": "".join(delta.get("content") or "" for delta in deltas),
        "ends": [choice["finish_reason"] for choice in choices if choice["finish_reason"]],
        "usage": [usage(event) for event in events if event.get("usage")],
        "done": answer.text.rstrip().endswith("data: [DONE]"),
    }


def form(answer):
    """White space, which a schema leaves open, has the model choose otherwise."""
    said = json.loads(chat(answer)["content"])
    return [sorted(said), said["sky"] in ["blue", "grey"], type(said["rains"]).__name__, chat(answer)["finish_reason"]]


def called(answer):
    return {key: value for key, value in chat(answer).items() if key in ("calls", "finish_reason")}


def chat_logprobs(answer):
    [choice] = answer.json()["choices"]
    one = lambda token: [token["token"], token["logprob"], token["bytes"]]
    return [one(token) + [[one(top) for top in token["top_logprobs"]]] for token in choice["logprobs"]["content"]]


def chat_stream_logprobs(answer):
    choices = [choice for event in answer.events() for choice in event["choices"]]
    return [[token["token"], token["logprob"]] for choice in choices
            for token in (choice.get("logprobs") or {}).get("content") or []]


def completion_logprobs(answer):
    """Ours are as OpenAI has them for completions, llama.cpp's as for chats."""
    told = answer.json()["choices"][0]["logprobs"]
    if "content" in told:
        return [[token["token"], token["logprob"]] for token in told["content"]]
    return [list(pair) for pair in zip(told["tokens"], told["token_logprobs"], strict=True)]


def refused(answer):
    """An error's message is each server's own."""
    if answer.status == 200:
        return {"status": 200}
    return {"status": answer.status, "type": answer.json()["error"]["type"]}


def whole(answer):
    return answer.json()


def keys(*names):
    return lambda answer: {name: answer.json().get(name) for name in names}


def embeddings(answer):
    answer = answer.json()
    data = [[one["object"], one["index"], numbers(one["embedding"])] for one in answer["data"]]
    told = [answer["usage"][key] for key in ("prompt_tokens", "total_tokens")]
    return {"object": answer["object"], "data": data, "usage": told}


def numbers(embedding):
    if isinstance(embedding, str):
        data = base64.b64decode(embedding)
        return list(struct.unpack(f"<{len(data) // 4}f", data))
    return embedding


def models(answer):
    [one] = [model for model in answer.json()["data"] if model["id"] == MODEL]
    meta = {key: one["meta"][key] for key in ("n_ctx_train", "n_params")}
    return {"object": answer.json()["object"], "model": one["object"], "meta": meta}


def message(answer):
    answer = answer.json()
    said = [[part["type"], part.get("text")] for part in answer["content"]]
    told = answer["usage"]
    told = [told["input_tokens"] + (told.get("cache_read_input_tokens") or 0), told["output_tokens"]]
    return [answer["type"], answer["role"], said, answer["stop_reason"], told]


def message_stream(answer):
    events = answer.events()
    text = "".join(event["delta"].get("text", "") for event in events if event["type"] == "content_block_delta")
    kinds = [event["type"] for event in events if event["type"] not in ("ping", "content_block_delta")]
    return [text, kinds]


def response(answer):
    answer = answer.json()
    said = [part["text"] for item in answer["output"] for part in item.get("content", [])]
    told = [answer["usage"][key] for key in ("input_tokens", "output_tokens", "total_tokens")]
    return [answer["object"], said, told]


# What is asked.


def completions():
    path = "/v1/completions"
    ask = GREEDY | {"prompt": NOVEL}

    def case(name, pick=completion, why=None, **fields):
        return Case(f"completion, {name}", path, ask | fields, pick, why, ROUTED)

    yield case("novel")
    yield case("code", prompt=CODE)
    yield case("other letters", prompt="Où était-il? 東京で")
    yield case("200 tokens", max_tokens=200)
    yield case("one token", max_tokens=1)
    yield case("to the end of the context", why="the last token of ours is not computed any more, and has no room",
               max_tokens=None)
    yield case("no limit", why="the last token of ours is not computed any more, and has no room", max_tokens=-1)
    yield case("n_predict", why="a field of llama.cpp's", n_predict=8, max_tokens=None)
    yield case("stop", stop=["gentleman", "\n"])
    yield case("stop, a text", stop="and")
    yield case("stop, several tokens", stop=["with his back"], max_tokens=200)
    yield case("stop, the prompt has it", stop=["fire"])
    yield case("tokens as a prompt", prompt=[1282, 420, 257])
    yield case("two prompts", texts, prompt=[NOVEL, CODE])
    yield case("two prompts, usage", why="llama.cpp counts the first one alone", prompt=[NOVEL, CODE])
    usage_unasked = "llama.cpp tells usage in any case"
    yield case("stream", completion_stream, usage_unasked, stream=True)
    yield case("stream, usage", completion_stream, stream=True, stream_options={"include_usage": True})
    yield case("stream, stop", completion_stream, usage_unasked, stream=True, stop=["with his back"], max_tokens=200)
    yield case("logprobs", completion_logprobs, logprobs=3)
    yield case("logit_bias", logit_bias={"314": -100, "393": -5})
    yield case("repeat_penalty", repeat_penalty=1.3)
    yield case("repeat_last_n", repeat_penalty=1.3, repeat_last_n=8)
    yield case("penalties", presence_penalty=0.5, frequency_penalty=0.5)
    yield case("seed", temperature=0.8, seed=7)
    yield case("seed, top_k", temperature=1.2, seed=8, top_k=5, top_p=0.9, min_p=0.02, max_tokens=16)
    yield case("seed, typical_p", temperature=1, seed=9, typical_p=0.7)
    yield case("echo", why="llama.cpp passes it over", echo=True)
    yield case("suffix", why="llama.cpp passes it over; we refuse it, since the model has no tokens for it",
               suffix="The end.")
    yield case("five answers", refused, n=5)
    yield case("grammar", why="our grammars are in Lark, llama.cpp's in GBNF", grammar='root ::= "yes" | "no"')
    yield case("json_schema", why="a field of llama.cpp's", json_schema=SKY)
    yield case("unknown fields", unknown={"a": 1}, user="me", metadata=None)
    yield case("nulls", stop=None, seed=None, top_p=None, stream=None, logprobs=None, logit_bias=None)


def chats():
    path = "/v1/chat/completions"
    ask = GREEDY | {"messages": ASK}

    def case(name, pick=chat, why=None, **fields):
        return Case(f"chat, {name}", path, ask | fields, pick, why, ROUTED)

    system = [{"role": "system", "content": "You are brief."}]
    turns = ASK + [{"role": "assistant", "content": "An old man."}, {"role": "user", "content": "Who else?"}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "Who"}, {"type": "text", "text": "sits?"}]}]
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    results = ASK + [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "Rain."},
    ]
    schema = {"type": "json_schema", "json_schema": {"name": "sky", "strict": True, "schema": SKY}}
    yield case("plain")
    yield case("system", messages=system + ASK)
    yield case("developer", messages=[{"role": "developer", "content": "You are brief."}] + ASK)
    yield case("turns", messages=turns)
    yield case("parts", messages=parts)
    begun = ASK + [{"role": "assistant", "content": "The old"}]
    yield case("begun", why="llama.cpp repeats what was begun", messages=begun)
    yield case("begun, what follows", lambda answer: chat(answer)["content"].removeprefix("The old"), messages=begun)
    yield case("max_completion_tokens", max_tokens=None, max_completion_tokens=5)
    yield case("stop", stop=["\n"])
    yield case("stream", chat_stream, stream=True)
    yield case("stream, usage", chat_stream, stream=True, stream_options={"include_usage": True})
    yield case("logprobs", chat_logprobs, logprobs=True, top_logprobs=3)
    yield case("logprobs without others", chat_logprobs, "llama.cpp then tells 20 others", logprobs=True)
    yield case("stream, logprobs", chat_stream_logprobs, stream=True, logprobs=True, top_logprobs=2)
    yield case("json_schema", form, response_format=schema, max_tokens=200)
    yield case("json_object with a schema", form, response_format={"type": "json_object", "schema": SKY}, max_tokens=200)
    yield case("no thinking", chat_template_kwargs={"enable_thinking": False})
    yield case("tools", lambda answer: chat(answer)["content"].strip(), tools=TOOLS)
    yield case("tools, white space", why="with tools, llama.cpp takes white space off what is said", tools=TOOLS)
    yield case("tools, none", why="llama.cpp tells of tools that it lets nobody call", tools=TOOLS, tool_choice="none")
    one = {"parallel_tool_calls": False, "max_tokens": 200}
    white = "llama.cpp's grammar lets a model say anything before the call, and this one does not stop"
    yield case("tools, required", called, white, tools=TOOLS, tool_choice="required", **one)
    named = {"type": "function", "function": {"name": "weather"}}
    yield case("tools, named", called, white, tools=TOOLS, tool_choice=named, **one)
    yield case("tools, a result", messages=results, tools=TOOLS)
    yield case("reasoning_effort", reasoning_effort="none")


# Why errors differ.
STRICT = "we refuse it, llama.cpp passes it over"
FAILS = "llama.cpp says that it is its own fault (500)"
OWN_TYPE = "llama.cpp has a type of its own for that"


def errors():
    text, talk = "/v1/completions", "/v1/chat/completions"
    ask, said = GREEDY | {"prompt": NOVEL}, GREEDY | {"messages": ASK}
    long = NOVEL * 100

    def case(name, path, body, why=None):
        return Case(f"error, {name}", path, body, refused, why)

    def content(parts):
        return said | {"messages": [{"role": "user", "content": parts}]}

    yield case("no JSON", text, "{")
    yield case("no object", text, "[1]")
    yield case("no body", text, "")
    yield case("no prompt", text, GREEDY)
    yield case("prompt is a number", text, ask | {"prompt": 5})
    yield case("prompt is empty", text, ask | {"prompt": ""}, STRICT)
    yield case("no prompts", text, ask | {"prompt": []})
    yield case("an unknown token", text, ask | {"prompt": [1 << 20]})
    yield case("a negative token", text, ask | {"prompt": [-5]})
    yield case("too long", text, ask | {"prompt": long}, OWN_TYPE)
    yield case("too long, stream", text, ask | {"prompt": long, "stream": True}, OWN_TYPE)
    yield case("an unknown model", text, ask | {"model": "nobody"}, "llama.cpp has one model, by any name")
    yield case("no model", text, {"prompt": NOVEL, "max_tokens": 1}, "llama.cpp has one model, by any name")
    yield case("another method", text, None, "llama.cpp says that there is no such path")
    yield case("no such path", "/v1/nothing", {}, OWN_TYPE)
    yield case("no messages", talk, GREEDY)
    yield case("messages are a text", talk, said | {"messages": "hi"})
    yield case("messages are empty", talk, said | {"messages": []}, STRICT)
    yield case("a message is a text", talk, said | {"messages": ["hi"]})
    yield case("no role", talk, said | {"messages": [{"content": "hi"}]}, FAILS)
    yield case("no content", talk, said | {"messages": [{"role": "user"}]})
    yield case("content is a number", talk, content(5))
    yield case("content of an unknown type", talk, content([{"type": "smell", "text": "hi"}]))
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    yield case("an image", talk, content([image]), FAILS)
    yield case("too long a chat", talk, content(long), OWN_TYPE)
    yield case("a tool twice", talk, said | {"tools": TOOLS + TOOLS})
    yield case("tokenize, no content", "/tokenize", {"model": MODEL}, STRICT)
    yield case("tokenize, a number", "/tokenize", {"model": MODEL, "content": 5})
    yield case("detokenize, no tokens", "/detokenize", {"model": MODEL}, STRICT)
    yield case("detokenize, an unknown token", "/detokenize", {"model": MODEL, "tokens": [1 << 20]}, FAILS)
    for name, value, *why in FIELDS:
        yield case(f"{name}: {json.dumps(value)}", text, ask | {name: value}, *why)
    for name, value, *why in CHAT_FIELDS:
        yield case(f"chat, {name}: {json.dumps(value)}", talk, said | {name: value}, *why)
    yield case("chat, 50 logprobs", talk, said | {"logprobs": True, "top_logprobs": 50}, STRICT)


# Values that fields should not have.
FIELDS = [
    ("max_tokens", "many"), ("max_tokens", 0, STRICT), ("max_tokens", 1.5, STRICT), ("max_tokens", -2),
    ("temperature", "hot"), ("temperature", -1, STRICT), ("top_p", 2, STRICT), ("top_p", "x"), ("top_k", "x"),
    ("top_k", -1), ("min_p", -1, STRICT), ("seed", "x"), ("seed", -1), ("seed", 1 << 40), ("stop", 5, STRICT),
    ("stop", [5]), ("stop", [""]), ("stop", ""), ("stream", "yes"), ("n", 0), ("n", "x"), ("logit_bias", 5, STRICT),
    ("logit_bias", {"x": 1}, STRICT), ("logprobs", "x"), ("logprobs", -1, STRICT), ("repeat_penalty", "x"),
    ("presence_penalty", 1000, STRICT), ("grammar", 5, STRICT), ("grammar", "("), ("stream_options", 5, STRICT),
]
CHAT_FIELDS = [
    ("tools", 5, FAILS), ("tools", [5], FAILS), ("tools", []), ("tool_choice", "some"),
    ("tool_choice", "required", STRICT), ("response_format", "json", STRICT), ("response_format", {"type": "xml"}),
    ("response_format", {"type": "json_schema"}, STRICT), ("response_format", {}, STRICT),
    ("response_format", {"type": "json_object", "schema": {"type": "nothing"}}), ("logprobs", 3, STRICT),
    ("top_logprobs", 3), ("top_logprobs", 50), ("reasoning_effort", "huge", STRICT),
    ("chat_template_kwargs", 5, STRICT), ("chat_template_kwargs", {"enable_thinking": "no"}),
]


def others():
    text = "It was a <|endoftext|> cold é 東 evening"
    said = {"model": MODEL, "content": text}
    yield Case("tokenize", "/tokenize", said, whole)
    yield Case("tokenize, add_special", "/tokenize", said | {"add_special": True}, whole)
    yield Case("tokenize, no parse_special", "/tokenize", said | {"parse_special": False}, whole)
    yield Case("tokenize, with_pieces", "/tokenize", said | {"with_pieces": True}, whole)
    yield Case("tokenize, empty", "/tokenize", said | {"content": ""}, whole)
    yield Case("detokenize", "/detokenize", {"model": MODEL, "tokens": [1282, 420, 257, 0, 3051, 168]}, whole)
    yield Case("detokenize, none", "/detokenize", {"model": MODEL, "tokens": []}, whole)
    yield Case("health", "/health", None, whole)
    yield Case("health, v1", "/v1/health", None, whole)
    yield Case("props", "/props", None, keys("total_slots", "model_alias", "chat_template", "bos_token", "eos_token"))
    n_ctx = lambda answer: answer.json()["default_generation_settings"]["n_ctx"]
    yield Case("props, n_ctx", "/props", None, n_ctx)
    yield Case("models", "/v1/models", None, models)
    ask = {"model": MODEL, "messages": ASK, "max_tokens": 16, "temperature": 0}
    yield Case("messages", "/v1/messages", ask, message)
    yield Case("messages, system", "/v1/messages", ask | {"system": "You are brief."}, message)
    yield Case("messages, stop", "/v1/messages", ask | {"stop_sequences": ["\n"]}, message,
               "llama.cpp says end_turn of a stop sequence")
    yield Case("messages, stream", "/v1/messages", ask | {"stream": True}, message_stream)
    yield Case("messages, count_tokens", "/v1/messages/count_tokens", ask, whole)
    ask = {"model": MODEL, "input": ASK, "max_output_tokens": 16, "temperature": 0}
    yield Case("responses", "/v1/responses", ask, response)
    yield Case("responses, a text", "/v1/responses", ask | {"input": "Who sits by the fire?"}, response)
    yield Case("responses, instructions", "/v1/responses", ask | {"instructions": "You are brief."}, response)
    yield Case("responses, status", "/v1/responses", ask, keys("status"), "llama.cpp calls what was cut completed")


def embedded():
    """For a server of embeddings."""
    ask = {"model": MODEL}
    texts = [NOVEL, "sea", CODE]

    def case(name, pick=embeddings, why=None, **fields):
        return Case(f"embeddings, {name}", "/v1/embeddings", ask | fields, pick, why, EMBEDDED)

    yield case("one", input=NOVEL)
    yield case("three", input=texts)
    yield case("tokens", input=[1282, 420, 257])
    yield case("lists of tokens", input=[[1282, 420], [257]])
    yield case("base64", input=NOVEL, encoding_format="base64")
    yield case("error, none", refused, input=[])
    yield case("error, empty", refused, input="")
    yield case("error, no input", refused)
    yield case("error, a number", refused, input=5.5)
    yield case("error, format", refused, input="a", encoding_format="hex")
    yield case("error, too long", refused, OWN_TYPE, input=NOVEL * 100)


def cases():
    return [*completions(), *chats(), *others(), *errors()]
