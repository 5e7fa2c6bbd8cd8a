"""openai for Python: responses."""

import json

import openai
import pydantic
import pytest

import says
from says import call, say, user

TOOLS = [
    {"type": "function", "name": "weather", "description": "The weather", "parameters": says.WEATHER},
    {"type": "function", "name": "clock", "parameters": says.CLOCK},
]


@pytest.fixture
def ask(server):
    client = openai.OpenAI(base_url=server.v1, api_key="none", max_retries=0)
    return lambda said, **options: client.responses.create(model="one", input=say(said), **options)


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=server.v1, api_key="none", max_retries=0)


def test_create(ask):
    answer = ask("Hello, you.")
    assert answer.object == "response" and answer.id.startswith("resp_") and answer.status == "completed"
    assert answer.output_text == "Hello, you." and answer.model == "one" and answer.error is None
    [item] = answer.output
    assert (item.type, item.role, item.status) == ("message", "assistant", "completed")
    assert answer.usage.output_tokens == len("Hello, you.")
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    assert ask("x", instructions="Be brief.").instructions == "Be brief."


def test_lists_of_items(client):
    items = [
        {"role": "developer", "content": "Be brief."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": say("Yes.")}]},
    ]
    first = client.responses.create(model="one", input=items)
    assert first.output_text == "Yes."
    # What came is sent back as it came.
    more = items + [item.model_dump() for item in first.output] + user("No.")
    assert client.responses.create(model="one", input=more).output_text == "No."


def test_length(ask):
    answer = ask("one two", max_output_tokens=3)
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert answer.output_text == "one"


def test_stream(client):
    with client.responses.stream(model="one", input=say("Grüße")) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert final.output_text == "Grüße" and final.status == "completed"
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
    ]
    assert kinds[4:-4] == ["response.output_text.delta"] * 5
    assert kinds[-4:] == [
        "response.output_text.done", "response.content_part.done", "response.output_item.done", "response.completed",
    ]
    assert "".join(event.delta for event in events[4:-4]) == "Grüße"


def test_tools(client, ask):
    answer = ask(call("weather", city="Oslo") + "\n" + call("clock"), tools=TOOLS)
    told = [(item.type, item.name, json.loads(item.arguments)) for item in answer.output]
    assert told == [("function_call", "weather", {"city": "Oslo"}), ("function_call", "clock", {})]
    assert len({item.call_id for item in answer.output}) == 2
    items = [
        *user("x"),
        *[item.model_dump() for item in answer.output],
        {"type": "function_call_output", "call_id": answer.output[0].call_id, "output": say("It rains.")},
        {"type": "function_call_output", "call_id": answer.output[1].call_id, "output": "It is noon."},
    ]
    assert client.responses.create(model="one", input=items, tools=TOOLS).output_text == "It rains."


def test_the_choice_of_tools(ask):
    text = "Nothing to call for."
    named = ask(text, tools=TOOLS, tool_choice={"type": "function", "name": "clock"})
    assert [item.name for item in named.output] == ["clock"]
    assert ask(call("clock"), tools=TOOLS, tool_choice="required").output[0].name == "clock"
    assert ask(text, tools=TOOLS, tool_choice="none").output_text == text
    with pytest.raises(openai.BadRequestError, match="tool_choice"):
        ask(text, tool_choice="required")


def test_tools_in_a_stream(client):
    with client.responses.stream(model="one", input=say(call("weather", city="Oslo")), tools=TOOLS) as stream:
        events = list(stream)
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    [done] = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert len(deltas) > 4 and "".join(deltas) == done.arguments
    assert json.loads(done.arguments) == {"city": "Oslo"} and done.name == "weather"


class Weather(pydantic.BaseModel):
    sky: str
    rains: bool


def test_forms(client, ask):
    answer = client.responses.parse(model="one", input=say('{"sky": "blue", "rains": true}'), text_format=Weather)
    assert answer.output_parsed == Weather(sky="blue", rains=True)
    form = {"type": "json_schema", "name": "colours", "schema": says.COLOURS}
    assert json.loads(ask("No.", text={"format": form}).output_text)["sky"] in ["blue", "grey"]
    assert json.loads(ask("{}", text={"format": {"type": "json_object"}}).output_text) == {}


def test_thinking(client, ask):
    answer = ask("<think>\nWell.\n</think>\n\nYes.", reasoning={"effort": "low"})
    assert [item.type for item in answer.output] == ["reasoning", "message"]
    assert answer.output[0].content[0].text.strip() == "Well." and answer.output_text == "Yes."
    with client.responses.stream(model="one", input=say("<think>\nWell.\n</think>\n\nYes.")) as stream:
        events = list(stream)
    thought = [event.delta for event in events if event.type == "response.reasoning_text.delta"]
    assert "".join(thought).strip() == "Well."


def test_errors(client, ask):
    for wrong in [
        dict(temperature=-1), dict(previous_response_id="resp_1"), dict(max_output_tokens=0),
        dict(reasoning={"effort": "much"}), dict(text={"format": {"type": "xml"}}),
    ]:
        with pytest.raises(openai.BadRequestError):
            ask("x", **wrong)
    image = {"type": "input_image", "image_url": "data:image/png;base64,AA=="}
    with pytest.raises(openai.BadRequestError, match="input_image"):
        client.responses.create(model="one", input=[{"role": "user", "content": [image]}])
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="three", input="x")
    with pytest.raises(openai.InternalServerError, match="the script says so"):
        client.responses.create(model="one", input="FAIL NOW")


def test_an_answer_that_fails(client):
    events = list(client.responses.create(model="one", input=say("abc FAIL~ NOW"), stream=True))
    assert events[-1].type == "response.failed"
    assert "the script says so" in events[-1].response.error.message


def test_who_leaves_frees_the_sequence(start):
    server = start(sequences=1, gate=1)
    client = openai.OpenAI(base_url=server.v1, api_key="none", max_retries=0)
    server.tell("open 20")
    stream = client.responses.create(model="one", input=say("x" * 1000), stream=True)
    next(stream)
    says.end_midway(server, stream)
    assert client.responses.create(model="one", input=say("y")).output_text == "y"
