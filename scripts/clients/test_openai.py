"""openai for Python: chats, texts, embeddings, models, errors."""

import asyncio
import base64
import json
import struct

import openai
import pydantic
import pytest

import says
from says import say, user


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=server.v1, api_key="none", max_retries=0)


def connect(server, key="none"):
    return openai.OpenAI(base_url=server.v1, api_key=key, max_retries=0)


def test_chat(client):
    answer = client.chat.completions.create(model="one", messages=user("Hello, you."))
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    assert answer.model == "one" and answer.created > 1_600_000_000 and answer.system_fingerprint
    [choice] = answer.choices
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "stop", None)
    assert (choice.message.role, choice.message.content) == ("assistant", "Hello, you.")
    assert choice.message.tool_calls is None and choice.message.refusal is None
    assert answer.usage.completion_tokens == len("Hello, you.")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.model_extra["timings"]["predicted_n"] == answer.usage.completion_tokens


def test_a_prompt_that_was_read_before_is_told_as_cached(client):
    first = client.chat.completions.create(model="one", messages=user("a"))
    again = client.chat.completions.create(model="one", messages=user("a"))
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert again.usage.prompt_tokens_details.cached_tokens == again.usage.prompt_tokens - 1


def test_system_developer_and_parts(client):
    for role in ["system", "developer"]:
        messages = [
            {"role": role, "content": say("from the system")},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        ]
        answer = client.chat.completions.create(model="one", messages=messages)
        assert answer.choices[0].message.content == "from the system"
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    answer = client.chat.completions.create(model="one", messages=parts)
    assert answer.choices[0].message.content == "You said: b"


def test_stream(client):
    stream = client.chat.completions.create(
        model="one", messages=user("Grüße"), stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    with_choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    texts = [choice.delta.content for choice in with_choices if choice.delta.content]
    # A token is a byte, and no character is cut.
    assert texts == list("Grüße")
    assert [choice.finish_reason for choice in with_choices[:-1]] == [None] * (len(with_choices) - 1)
    assert with_choices[-1].finish_reason == "stop"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == len("Grüße".encode())
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_stream_without_usage(client):
    chunks = list(client.chat.completions.create(model="one", messages=user("ab"), stream=True))
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_many_at_once(server):
    async def ask():
        client = openai.AsyncOpenAI(base_url=server.v1, api_key="none", max_retries=0)
        one = lambda n: client.chat.completions.create(model="one", messages=user(f"number {n}"))
        answers = await asyncio.gather(*map(one, range(16)))
        return [answer.choices[0].message.content for answer in answers]

    assert asyncio.run(ask()) == [f"number {n}" for n in range(16)]


def test_stop_and_length(client):
    def ask(**options):
        answer = client.chat.completions.create(model="one", messages=user("one two three"), **options)
        return answer.choices[0].message.content, answer.choices[0].finish_reason

    assert ask(stop="two") == ("one ", "stop")
    assert ask(stop=["three", "wo"]) == ("one t", "stop")
    assert ask(max_tokens=5) == ("one t", "length")
    assert ask(max_completion_tokens=3) == ("one", "length")


def test_samplers_are_taken(client):
    answer = client.chat.completions.create(
        model="one", messages=user("x"), temperature=0.3, top_p=0.5, seed=-5, presence_penalty=0.5,
        frequency_penalty=-0.5, user="me", n=1, store=False, metadata={"a": "b"}, service_tier="auto",
        extra_body={"top_k": 5, "min_p": 0.1, "repeat_penalty": 1.1},
    )
    assert answer.choices[0].message.content == "x"


def test_bias(client):
    # 10 for what is said and 1 at most for others: a letter that is forbidden is not said.
    answer = client.chat.completions.create(
        model="one", messages=user("abc"), logit_bias={str(ord("b")): -100}, max_tokens=2
    )
    assert answer.choices[0].message.content[0] == "a" and "b" not in answer.choices[0].message.content


def test_logprobs(client):
    ask = dict(model="one", messages=user("aé"), logprobs=True, top_logprobs=3)
    [choice] = client.chat.completions.create(**ask).choices
    tokens = choice.logprobs.content
    assert [bytes(token.bytes) for token in tokens] == [b"a", b"\xc3", b"\xa9"]
    for token in tokens:
        assert -0.1 < token.logprob < 0 and len(token.top_logprobs) == 3
        assert token.top_logprobs[0].bytes == token.bytes
        assert token.top_logprobs[1].logprob < -5
    streamed = [chunk.choices[0].logprobs for chunk in client.chat.completions.create(**ask, stream=True)]
    assert [token for part in streamed if part for token in part.content] == tokens


def test_thinking(client):
    ask = dict(model="one", messages=user("<think>\nWell.\n</think>\n\nYes."))
    message = client.chat.completions.create(**ask).choices[0].message
    assert (message.model_extra["reasoning_content"].strip(), message.content) == ("Well.", "Yes.")
    deltas = [chunk.choices[0].delta for chunk in client.chat.completions.create(**ask, stream=True)]
    thought = "".join((delta.model_extra or {}).get("reasoning_content") or "" for delta in deltas)
    assert thought.strip() == "Well."
    assert "".join(delta.content or "" for delta in deltas) == "Yes."
    off = client.chat.completions.create(model="one", messages=user("No."), reasoning_effort="none")
    assert off.choices[0].message.content == "No."
    # Who says how much is to be thought to a model that does not think is not refused.
    plain = client.chat.completions.create(model="plain", messages=user("No."), reasoning_effort="high")
    assert plain.choices[0].message.content == "No."


class Weather(pydantic.BaseModel):
    sky: str
    rains: bool


def schema(schema):
    return {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}


def test_schema(client):
    said = '{"sky": "blue", "rains": false}'
    parsed = client.chat.completions.parse(model="one", messages=user(said), response_format=Weather)
    assert parsed.choices[0].message.parsed == Weather(sky="blue", rains=False)
    # Whatever the model would say: the form holds it.
    for text in ["Nothing of that kind.", '{"sky": "green"}']:
        answer = client.chat.completions.create(
            model="one", messages=user(text), response_format=schema(says.COLOURS)
        )
        value = json.loads(answer.choices[0].message.content)
        assert set(value) == {"sky", "rains"} and value["sky"] in ["blue", "grey"]
        assert answer.choices[0].finish_reason == "stop"
    answer = client.chat.completions.create(
        model="one", messages=user('{"a": [1]}'), response_format={"type": "json_object"}
    )
    assert json.loads(answer.choices[0].message.content) == {"a": [1]}


def test_schema_in_a_stream(client):
    with client.chat.completions.stream(
        model="one", messages=user('{"sky":"grey","rains":true}'), response_format=Weather
    ) as stream:
        kinds = [event.type for event in stream]
        assert stream.get_final_completion().choices[0].message.parsed == Weather(sky="grey", rains=True)
    assert "content.delta" in kinds and "content.done" in kinds


def test_grammar(client):
    answer = client.chat.completions.create(
        model="one", messages=user("whatever"), extra_body={"grammar": 'start: "yes" | "no"'}
    )
    assert answer.choices[0].message.content in ["yes", "no"]


def test_embeddings(client):
    # The client asks for base64 by itself, and reads it.
    answer = client.embeddings.create(model="one", input=["aei", "oo"])
    assert [item.index for item in answer.data] == [0, 1]
    assert answer.data[0].embedding == pytest.approx(says.unit(1, 1, 1, 0, 0))
    assert answer.data[1].embedding == pytest.approx(says.unit(0, 0, 0, 1, 0))
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 0
    floats = client.embeddings.create(model="one", input="aei", encoding_format="float")
    assert floats.data[0].embedding == pytest.approx(says.unit(1, 1, 1, 0, 0))
    text = client.embeddings.create(model="one", input="aei", encoding_format="base64").data[0].embedding
    assert struct.unpack("<5f", base64.b64decode(text)) == pytest.approx(says.unit(1, 1, 1, 0, 0))
    short = client.embeddings.create(model="one", input="aei", dimensions=2)
    assert short.data[0].embedding == pytest.approx(says.unit(1, 1))
    tokens = client.embeddings.create(model="one", input=[list(b"aei"), list(b"u")])
    assert tokens.data[1].embedding == pytest.approx(says.unit(0, 0, 0, 0, 1))
    for wrong in [dict(input="a", dimensions=6), dict(input=""), dict(input="a" * 5000), dict(input=[[9999]])]:
        with pytest.raises(openai.BadRequestError):
            client.embeddings.create(model="one", **wrong)


def test_completions(client):
    ask = dict(model="one", prompt="abc", max_tokens=4)
    answer = client.completions.create(**ask)
    assert answer.object == "text_completion" and answer.id.startswith("cmpl-")
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("defg", "length")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (4, 4)
    assert client.completions.create(**ask, echo=True).choices[0].text == "abcdefg"
    assert client.completions.create(**ask, stop="f").choices[0].text == "de"
    chunks = list(client.completions.create(**ask, echo=True, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == "abcdefg"
    assert chunks[-1].usage.completion_tokens == 4
    several = client.completions.create(model="one", prompt=["a", "x"], max_tokens=2)
    assert [(choice.index, choice.text) for choice in several.choices] == [(0, "bc"), (1, "yz")]
    tokens = client.completions.create(model="one", prompt=list(b"ab"), max_tokens=1)
    assert tokens.choices[0].text == "c"
    logprobs = client.completions.create(model="one", prompt="ab", max_tokens=2, logprobs=2).choices[0].logprobs
    assert logprobs.tokens == ["c", "d"] and logprobs.text_offset == [0, 1]
    assert all(set(top) > {token} for token, top in zip(logprobs.tokens, logprobs.top_logprobs))


def test_a_gap_is_filled(client):
    answer = client.completions.create(model="fill", prompt="abc", suffix="xyz", max_tokens=3)
    assert answer.choices[0].text == "abc"
    assert answer.usage.prompt_tokens == len("<pre>") - 4 + 3 + 1 + 3 + 1 + 1
    with pytest.raises(openai.BadRequestError, match="does not support insert"):
        client.completions.create(model="one", prompt="abc", suffix="xyz")


def test_models(client):
    models = {model.id: model for model in client.models.list()}
    assert set(models) == {"one", "two", "plain", "fill"}
    assert models["one"].object == "model" and models["one"].owned_by
    assert client.models.retrieve("one") == models["one"]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("three")


def test_errors(client):
    def refused(kind, match, **changes):
        ask = dict(model="one", messages=user("x")) | changes
        with pytest.raises(kind, match=match) as error:
            client.chat.completions.create(**ask)
        assert error.value.type and error.value.body["message"]
        return error.value

    missing = refused(openai.NotFoundError, "three", model="three")
    assert missing.code == "model_not_found"
    assert refused(openai.BadRequestError, "temperature", temperature=-1).param == "temperature"
    assert refused(openai.BadRequestError, "n ", n=2).param == "n"
    refused(openai.BadRequestError, "messages", messages=[])
    refused(openai.BadRequestError, "model", model="")
    refused(openai.BadRequestError, "reasoning_effort", reasoning_effort="much")
    refused(openai.BadRequestError, "max_tokens", max_tokens=0)
    refused(openai.BadRequestError, "max_completion_tokens", max_completion_tokens=0)
    refused(openai.BadRequestError, "top_logprobs", logprobs=True, top_logprobs=21)
    refused(openai.BadRequestError, "response_format", response_format={"type": "xml"})
    refused(openai.BadRequestError, "the schema cannot be used: Invalid type: nothing", response_format=schema({"type": "nothing"}))
    refused(openai.BadRequestError, "logit_bias", logit_bias={"a": 1})
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    refused(openai.BadRequestError, "image_url", messages=[{"role": "user", "content": [image]}])
    refused(openai.InternalServerError, "the script says so", messages=[{"role": "user", "content": "FAIL NOW"}])


def test_the_context_is_full(start):
    client = connect(start(ctx=200))
    with pytest.raises(openai.BadRequestError, match="context") as error:
        client.chat.completions.create(model="one", messages=user("x" * 300))
    assert error.value.code == "context_length_exceeded"
    # An answer that comes to its end is cut.
    answer = client.chat.completions.create(model="one", messages=user("x" * 100))
    assert answer.choices[0].finish_reason == "length"


def test_an_answer_that_fails(client):
    stream = client.chat.completions.create(model="one", messages=user("abc FAIL~ NOW"), stream=True)
    with pytest.raises(openai.APIError, match="the script says so"):
        list(stream)


def test_keys(start):
    server = start(key="secret")
    with pytest.raises(openai.AuthenticationError) as error:
        connect(server).models.list()
    assert error.value.code == "invalid_api_key"
    assert len(connect(server, "secret").models.list().data) == 4


def test_who_leaves_frees_the_sequence(start):
    server = start(sequences=1, gate=1)
    client = connect(server)
    server.tell("open 20")
    stream = client.chat.completions.create(model="one", messages=user("x" * 1000), stream=True)
    next(stream)
    says.end_midway(server, stream)
    assert client.chat.completions.create(model="one", messages=user("y")).choices[0].message.content == "y"
    assert server.metric("llamacpp:requests_processing") == 0


def test_a_queue_that_is_full(start):
    server = start(sequences=1, gate=1, queue=0)
    client = connect(server)
    server.tell("open 5")
    stream = client.chat.completions.create(model="one", messages=user("x" * 10), stream=True)
    next(stream)
    server.tell("reached 1")
    with pytest.raises(openai.InternalServerError) as error:
        client.chat.completions.create(model="one", messages=user("y"))
    assert error.value.status_code == 503 and error.value.response.headers["retry-after"] == "2"
    server.tell("open 1000000")
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "x" * 10
