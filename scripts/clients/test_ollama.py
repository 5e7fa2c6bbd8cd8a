"""ollama for Python: its replies are checked against the types that the package has."""

import asyncio
import datetime
import json

import ollama
import pydantic
import pytest

import says
from says import call, functions, say, user


@pytest.fixture
def client(server):
    return ollama.Client(host=server.url)


def loaded(client):
    return [model.model for model in client.ps().models]


def test_chat(client):
    answer = client.chat(model="one", messages=user("Hello, you."))
    assert (answer.message.role, answer.message.content) == ("assistant", "Hello, you.")
    assert (answer.model, answer.done, answer.done_reason) == ("one", True, "stop")
    assert datetime.datetime.fromisoformat(answer.created_at).tzinfo
    assert answer.eval_count == len("Hello, you.") and answer.prompt_eval_count > 0
    assert answer.total_duration >= answer.load_duration > 0
    assert answer.eval_duration > 0 and answer.prompt_eval_duration > 0
    assert client.chat(model="one", messages=user("a")).load_duration == 0


def test_chat_in_a_stream(client):
    parts = list(client.chat(model="one", messages=user("Grüße"), stream=True))
    assert [part.message.content for part in parts] == [*"Grüße", ""]
    assert [part.done for part in parts] == [False] * 5 + [True]
    assert all(part.message.role == "assistant" for part in parts)
    last = parts[-1]
    assert last.done_reason == "stop" and last.eval_count == len("Grüße".encode())
    assert parts[0].done_reason is None and parts[0].eval_count is None


def test_generate(client):
    answer = client.generate(model="one", prompt=say("Hello."))
    assert (answer.response, answer.done, answer.done_reason) == ("Hello.", True, "stop")
    parts = list(client.generate(model="one", prompt=say("abc"), stream=True))
    assert "".join(part.response for part in parts) == "abc"
    assert parts[-1].context and parts[0].context is None
    # What comes next is gone on with from there.
    more = client.generate(model="one", prompt=say("d"), context=parts[-1].context)
    assert more.response == "d" and more.prompt_eval_count > parts[-1].prompt_eval_count + 3
    system = client.generate(model="one", prompt="x", system=say("I"))
    assert system.response == "I"


def test_raw_text_and_gaps(client):
    few = {"num_predict": 3}
    raw = client.generate(model="one", prompt="abc", raw=True, options=few)
    assert (raw.response, raw.done_reason, raw.prompt_eval_count) == ("def", "length", 4)
    assert client.generate(model="fill", prompt="abc", suffix="xyz", options=few).response == "abc"
    with pytest.raises(ollama.ResponseError, match="does not support insert"):
        client.generate(model="one", prompt="abc", suffix="xyz")
    own = client.generate(model="one", prompt="abc", template="{{ .Prompt }}", options=few)
    assert own.response == "def"


def test_options(client):
    def ask(**options):
        answer = client.chat(model="one", messages=user("one two three"), options=options)
        return answer.message.content, answer.done_reason

    assert ask(stop=["two"]) == ("one ", "stop")
    assert ask(num_predict=3) == ("one", "length")
    assert ask(num_predict=-1)[1] == ask(num_predict=-2)[1] == "stop"
    assert ask(seed=7, temperature=0.0, top_k=1, top_p=0.5, min_p=0.1, num_thread=4, mirostat=1)[1] == "stop"
    client.chat(model="one", messages=user("x"), options={"num_ctx": 1234})
    assert [model.context_length for model in client.ps().models] == [1234]


def test_tools(client):
    def ask(text, **options):
        return client.chat(model="one", messages=user(text), tools=functions(), **options)

    text = call("weather", city="Oslo") + "\n" + call("clock")
    told = lambda calls: [(call.function.name, call.function.arguments) for call in calls]
    both = [("weather", {"city": "Oslo"}), ("clock", {})]
    answer = ask(text)
    assert told(answer.message.tool_calls) == both and not answer.message.content.strip()
    assert answer.done_reason == "stop"
    parts = list(ask(text, stream=True))
    assert told([call for part in parts for call in part.message.tool_calls or []]) == both
    assert ask("None.").message.tool_calls is None
    messages = [
        {"role": "user", "content": "How is it in Oslo?"},
        answer.message,
        {"role": "tool", "tool_name": "weather", "content": say("It rains.")},
    ]
    assert client.chat(model="one", messages=messages).message.content == "It rains."
    with pytest.raises(ollama.ResponseError, match="does not support tools"):
        client.chat(model="plain", messages=user("x"), tools=functions())


def test_functions_as_tools(client):
    def add(a: int, b: int) -> int:
        """Adds.

        Args:
            a: One number
            b: Another one
        """
        return a + b

    answer = client.chat(model="one", messages=user(call("add", a=1, b=2)), tools=[add])
    assert add(**answer.message.tool_calls[0].function.arguments) == 3


class Weather(pydantic.BaseModel):
    sky: str
    rains: bool


def test_forms(client):
    said = '{"sky": "blue", "rains": false}'
    answer = client.chat(model="one", messages=user(said), format=Weather.model_json_schema())
    assert Weather.model_validate_json(answer.message.content) == Weather(sky="blue", rains=False)
    held = client.generate(model="one", prompt=say("No."), format=says.COLOURS)
    assert json.loads(held.response)["sky"] in ["blue", "grey"]
    assert json.loads(client.generate(model="one", prompt=say('{"a": 1}'), format="json").response) == {"a": 1}


def test_thinking(client):
    text = "<think>\nWell.\n</think>\n\nYes."
    answer = client.chat(model="one", messages=user(text), think=True)
    assert (answer.message.thinking.strip(), answer.message.content) == ("Well.", "Yes.")
    parts = list(client.chat(model="one", messages=user(text), think=True, stream=True))
    assert "".join(part.message.thinking or "" for part in parts).strip() == "Well."
    assert "".join(part.message.content for part in parts) == "Yes."
    answer = client.generate(model="one", prompt=say(text), think="low")
    assert (answer.thinking.strip(), answer.response) == ("Well.", "Yes.")
    answer = client.chat(model="one", messages=user("No."), think=False)
    assert (answer.message.thinking, answer.message.content) == (None, "No.")
    with pytest.raises(ollama.ResponseError, match="does not support thinking"):
        client.chat(model="plain", messages=user("x"), think=True)
    assert client.chat(model="plain", messages=user("x"), think=False).message.content == "x"


def test_logprobs(client):
    answer = client.chat(model="one", messages=user("ab"), logprobs=True, top_logprobs=2)
    assert [token.token for token in answer.logprobs] == ["a", "b"]
    assert all(-0.1 < token.logprob < 0 and len(token.top_logprobs) == 2 for token in answer.logprobs)
    parts = list(client.generate(model="one", prompt=say("ab"), logprobs=True, stream=True))
    assert [token.token for part in parts for token in part.logprobs or []] == ["a", "b"]


def test_embeddings(client):
    answer = client.embed(model="one", input=["aei", "oo"])
    assert answer.embeddings[0] == pytest.approx(says.unit(1, 1, 1, 0, 0))
    assert answer.embeddings[1] == pytest.approx(says.unit(0, 0, 0, 1, 0))
    assert answer.model == "one" and answer.prompt_eval_count > 0 and answer.total_duration > 0
    assert client.embed(model="one", input="aei", dimensions=2).embeddings[0] == pytest.approx(says.unit(1, 1))
    assert list(client.embeddings(model="one", prompt="u").embedding) == pytest.approx(says.unit(0, 0, 0, 0, 1))
    # What is too long is cut, unless that is not wanted.
    assert client.embed(model="one", input="a" * 5000).prompt_eval_count == 4096
    with pytest.raises(ollama.ResponseError, match="context"):
        client.embed(model="one", input="a" * 5000, truncate=False)
    # An empty list asks for nothing, and loads the model.
    assert client.embed(model="one", input="").embeddings == []
    assert client.embed(model="two", input=[]).embeddings == []
    assert "two" in loaded(client)


def test_load_and_unload(client):
    assert loaded(client) == []
    answer = client.generate(model="one", prompt="")
    assert (answer.done_reason, answer.response, answer.done) == ("load", "", True)
    assert loaded(client) == ["one"]
    assert client.chat(model="two", messages=[]).done_reason == "load"
    assert sorted(loaded(client)) == ["one", "two"]
    assert client.generate(model="one", keep_alive=0).done_reason == "unload"
    assert loaded(client) == ["two"]
    assert client.chat(model="two", messages=[], keep_alive="0s").done_reason == "unload"
    assert loaded(client) == []


def test_how_long_models_stay(client):
    def expires(**options):
        client.chat(model="one", messages=user("x"), **options)
        left = client.ps().models[0].expires_at - datetime.datetime.now(datetime.timezone.utc)
        return left.total_seconds()

    assert 200 < expires() <= 300
    assert 3000 < expires(keep_alive="1h") <= 3600
    assert 500 < expires(keep_alive=600) <= 600
    assert expires(keep_alive=-1) > 1e9
    for wrong in ["soon", "5 parsecs"]:
        with pytest.raises(ollama.ResponseError, match="keep_alive"):
            client.chat(model="one", messages=user("x"), keep_alive=wrong)


def test_what_there_is(client):
    models = {model.model: model for model in client.list().models}
    assert set(models) == {"one", "two", "plain", "fill"}
    one = models["one"]
    assert one.size > 0 and len(one.digest) == 64 and one.modified_at.tzinfo
    assert (one.details.format, one.details.family, one.details.families) == ("gguf", "llama", ["llama"])
    client.generate(model="one")
    [running] = client.ps().models
    assert (running.model, running.name, running.digest) == ("one", "one", one.digest)
    assert running.size > 0 and running.size_vram == 0 and running.context_length == 4096


def test_show(client):
    shown = client.show("one")
    assert set(shown.capabilities) == {"completion", "tools", "thinking"}
    assert client.show("plain").capabilities == ["completion"]
    assert "insert" in client.show("fill").capabilities
    assert shown.modelinfo["general.architecture"] == "llama"
    assert shown.modelinfo["llama.context_length"] == 8192
    assert "tool_call" in shown.template and shown.modelfile.startswith("FROM ")
    assert shown.details.family == "llama" and shown.modified_at.tzinfo


def test_errors(client):
    def refused(status, match, call, **options):
        with pytest.raises(ollama.ResponseError, match=match) as error:
            call(**options)
        assert error.value.status_code == status

    for ask in [client.chat, client.generate, client.embed, client.show]:
        refused(404, "three", ask, model="three")
    refused(400, "temperature", client.chat, model="one", messages=user("x"), options={"temperature": -1})
    image = [{"role": "user", "content": "x", "images": [b"\x89PNG"]}]
    refused(400, "images", client.chat, model="one", messages=image)
    refused(400, "images", client.generate, model="one", prompt="x", images=[b"\x89PNG"])
    refused(500, "the script says so", client.generate, model="one", prompt="FAIL NOW")
    # Models that others have put there are only read.
    for ask in [client.delete, client.push, lambda model: client.copy(model, "other")]:
        refused(501, "only read", ask, model="one")
    refused(501, "no cache", client.pull, model="hf.co/owner/name")
    refused(501, "only read", client.create, model="new", from_="one")


def test_an_answer_that_fails(client):
    stream = client.chat(model="one", messages=user("abc FAIL~ NOW"), stream=True)
    with pytest.raises(ollama.ResponseError, match="the script says so"):
        list(stream)


def test_the_context_is_full(start):
    client = ollama.Client(host=start(ctx=200).url)
    long = {"role": "user", "content": "x" * 300}
    with pytest.raises(ollama.ResponseError, match="context") as error:
        client.chat(model="one", messages=[long])
    assert error.value.status_code == 400
    # A chat loses its oldest messages, as with Ollama.
    assert client.chat(model="one", messages=[long, *user("y")]).message.content == "y"


def test_keys(start):
    server = start(key="secret")
    with pytest.raises(ollama.ResponseError) as error:
        ollama.Client(host=server.url).list()
    assert error.value.status_code == 401
    client = ollama.Client(host=server.url, headers={"Authorization": "Bearer secret"})
    assert len(client.list().models) == 4


def test_many_at_once(server):
    async def ask():
        client = ollama.AsyncClient(host=server.url)
        one = lambda n: client.chat(model="one", messages=user(f"number {n}"))
        answers = await asyncio.gather(*map(one, range(16)))
        return [answer.message.content for answer in answers]

    assert asyncio.run(ask()) == [f"number {n}" for n in range(16)]


def test_who_leaves_frees_the_sequence(start):
    server = start(sequences=1, gate=1)
    client = ollama.Client(host=server.url)
    server.tell("open 20")
    stream = client.chat(model="one", messages=user("x" * 1000), stream=True)
    next(stream)
    says.end_midway(server, stream)
    assert client.chat(model="one", messages=user("y")).message.content == "y"
    assert server.metric("llamacpp:requests_processing") == 0
