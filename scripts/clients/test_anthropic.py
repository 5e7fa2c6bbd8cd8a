"""anthropic for Python: messages."""

import anthropic
import pytest

import says
from says import call, say, user

TOOLS = [
    {"name": "weather", "description": "The weather", "input_schema": says.WEATHER},
    {"name": "clock", "input_schema": says.CLOCK},
]


def connect(server, key="none"):
    return anthropic.Anthropic(base_url=server.url, api_key=key, max_retries=0)


@pytest.fixture
def client(server):
    return connect(server)


@pytest.fixture
def ask(client):
    def ask(text, **options):
        options = {"model": "one", "max_tokens": 500, "messages": user(text)} | options
        return client.messages.create(**options)

    return ask


def test_create(ask):
    answer = ask("Hello, you.", system="Be brief.")
    assert (answer.type, answer.role, answer.model) == ("message", "assistant", "one")
    assert answer.id.startswith("msg_") and answer.stop_reason == "end_turn" and answer.stop_sequence is None
    assert [(block.type, block.text) for block in answer.content] == [("text", "Hello, you.")]
    assert answer.usage.output_tokens == len("Hello, you.") and answer.usage.input_tokens > 0
    again = ask("Hello, you.", system=[{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}])
    assert again.usage.input_tokens == 1
    assert again.usage.cache_read_input_tokens == answer.usage.input_tokens - 1


def test_ends(ask):
    answer = ask("one two three", stop_sequences=["two"])
    assert (answer.content[0].text, answer.stop_reason, answer.stop_sequence) == ("one ", "stop_sequence", "two")
    answer = ask("one two three", max_tokens=3)
    assert (answer.content[0].text, answer.stop_reason) == ("one", "max_tokens")
    assert ask("x", metadata={"user_id": "me"}, extra_body={"temperature": 0.5, "top_p": 0.9, "top_k": 3}).content[0].text == "x"


def test_stream(client):
    with client.messages.stream(model="one", max_tokens=100, messages=user("Grüße")) as stream:
        events = list(stream)
        final = stream.get_final_message()
    assert final.content[0].text == "Grüße" and final.stop_reason == "end_turn"
    assert final.usage.output_tokens == len("Grüße".encode()) and final.usage.input_tokens > 0
    assert [event.text for event in events if event.type == "text"] == list("Grüße")
    kinds = [event.type for event in events if event.type not in ("text", "ping")]
    assert kinds == ["message_start", "content_block_start", *["content_block_delta"] * 5,
                     "content_block_stop", "message_delta", "message_stop"]


def test_tools(ask):
    answer = ask("Let me look. " + call("weather", city="Oslo") + "\n" + call("clock"), tools=TOOLS)
    assert answer.stop_reason == "tool_use"
    text, *uses = answer.content
    assert text.text.strip() == "Let me look."
    assert [(use.type, use.name, use.input) for use in uses] == [
        ("tool_use", "weather", {"city": "Oslo"}), ("tool_use", "clock", {}),
    ]
    results = [
        {"type": "tool_result", "tool_use_id": uses[0].id, "content": say("It rains.")},
        {"type": "tool_result", "tool_use_id": uses[1].id, "content": [{"type": "text", "text": "Noon."}]},
    ]
    messages = [
        {"role": "user", "content": "How is it in Oslo?"},
        {"role": "assistant", "content": answer.content},
        {"role": "user", "content": results},
    ]
    assert ask("", messages=messages, tools=TOOLS).content[0].text == "It rains."


def test_the_choice_of_tools(ask):
    text = "Nothing to call for."
    names = lambda answer: [block.name for block in answer.content if block.type == "tool_use"]
    assert names(ask(text, tools=TOOLS, tool_choice={"type": "tool", "name": "clock"})) == ["clock"]
    two = call("clock") + "\n" + call("clock")
    assert names(ask(two, tools=TOOLS, tool_choice={"type": "any"})) == ["clock", "clock"]
    one = {"type": "any", "disable_parallel_tool_use": True}
    assert names(ask(two, tools=TOOLS, tool_choice=one)) == ["clock"]
    assert ask(text, tools=TOOLS, tool_choice={"type": "none"}).content[0].text == text
    assert ask(text, tools=TOOLS, tool_choice={"type": "auto"}).content[0].text == text


def test_tools_in_a_stream(client):
    messages = user(call("weather", city="Oslo"))
    with client.messages.stream(model="one", max_tokens=200, messages=messages, tools=TOOLS) as stream:
        parts = [event.partial_json for event in stream if event.type == "input_json"]
        final = stream.get_final_message()
    assert len(parts) > 4
    assert final.content[-1].input == {"city": "Oslo"} and final.stop_reason == "tool_use"


def test_thinking(client, ask):
    text = "<think>\nWell.\n</think>\n\nYes."
    thinking = {"type": "enabled", "budget_tokens": 1024}
    answer = ask(text, thinking=thinking)
    thought, said = answer.content
    assert (thought.type, thought.thinking.strip(), said.text) == ("thinking", "Well.", "Yes.")
    with client.messages.stream(model="one", max_tokens=2000, messages=user(text), thinking=thinking) as stream:
        kinds = {event.type for event in stream}
        assert stream.get_final_message().content[0].thinking.strip() == "Well."
    assert "thinking" in kinds
    back = [*user("x"), {"role": "assistant", "content": answer.content}, *user("Done.")]
    assert ask("", messages=back).content[0].text == "Done."
    assert ask("No.", thinking={"type": "disabled"}).content[0].text == "No."


def test_count_tokens(client, ask):
    ask_for = dict(model="one", messages=user("Hello."), tools=TOOLS, system="Be brief.")
    counted = client.messages.count_tokens(**ask_for).input_tokens
    assert counted == client.messages.create(**ask_for, max_tokens=10).usage.input_tokens > 100


def test_models(client):
    assert {model.id for model in client.models.list()} == {"one", "two", "plain", "fill"}
    assert client.models.retrieve("one").id == "one"


def test_errors(client, ask, start):
    for wrong in [dict(extra_body={"temperature": -1}), dict(max_tokens=0), dict(tool_choice={"type": "any"}), dict(messages=[])]:
        with pytest.raises(anthropic.BadRequestError) as error:
            ask("x", **wrong)
        assert error.value.body["type"] == "error" and error.value.body["error"]["type"] == "invalid_request_error"
    with pytest.raises(anthropic.NotFoundError) as error:
        ask("x", model="three")
    assert error.value.body["error"]["type"] == "not_found_error"
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA=="}}
    with pytest.raises(anthropic.BadRequestError, match="image"):
        ask("", messages=[{"role": "user", "content": [image]}])
    with pytest.raises(anthropic.InternalServerError, match="the script says so"):
        ask("", messages=[{"role": "user", "content": "FAIL NOW"}])
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long"):
        ask("x" * 5000)


def test_an_answer_that_fails(client):
    stream = client.messages.create(model="one", max_tokens=100, messages=user("abc FAIL~ NOW"), stream=True)
    with pytest.raises(anthropic.APIStatusError, match="the script says so"):
        list(stream)


def test_keys(start):
    server = start(key="secret")
    with pytest.raises(anthropic.AuthenticationError) as error:
        connect(server).messages.create(model="one", max_tokens=9, messages=user("x"))
    assert error.value.body["error"]["type"] == "authentication_error"
    # This client sends its key in a header of its own.
    answer = connect(server, "secret").messages.create(model="one", max_tokens=9, messages=user("x"))
    assert answer.content[0].text == "x"


def test_who_leaves_frees_the_sequence(start):
    server = start(sequences=1, gate=1)
    client = connect(server)
    server.tell("open 20")
    stream = client.messages.create(model="one", max_tokens=1000, messages=user("x" * 1000), stream=True)
    next(iter(stream))
    says.end_midway(server, stream)
    answer = client.messages.create(model="one", max_tokens=9, messages=user("y"))
    assert answer.content[0].text == "y"
