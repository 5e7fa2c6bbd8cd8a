"""openai for Python: tools."""

import json

import openai
import pytest

import says
from says import call, functions, say, user


@pytest.fixture
def ask(server):
    client = openai.OpenAI(base_url=server.v1, api_key="none", max_retries=0)

    def ask(text, **options):
        options = {"tools": functions(), "messages": user(text)} | options
        return client.chat.completions.create(model="one", **options)

    return ask


def calls(answer):
    [choice] = answer.choices
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    assert all(call.id and call.type == "function" for call in choice.message.tool_calls)
    return [(call.function.name, json.loads(call.function.arguments)) for call in choice.message.tool_calls]


def test_one_call(ask):
    assert calls(ask(call("weather", city="Oslo"))) == [("weather", {"city": "Oslo"})]


def test_several_calls(ask):
    answer = ask(call("weather", city="Oslo") + "\n" + call("clock"))
    assert calls(answer) == [("weather", {"city": "Oslo"}), ("clock", {})]
    assert len({call.id for call in answer.choices[0].message.tool_calls}) == 2


def test_a_call_with_text(ask):
    answer = ask("Let me look. " + call("clock"))
    assert answer.choices[0].message.content.strip() == "Let me look."
    assert answer.choices[0].message.tool_calls[0].function.name == "clock"


def test_calls_in_a_stream(ask):
    chunks = list(ask(call("weather", city="Oslo") + "\n" + call("clock"), stream=True))
    found = {}
    for delta in (chunk.choices[0].delta for chunk in chunks):
        for part in delta.tool_calls or []:
            if part.id:
                assert part.index == len(found) and part.type == "function" and part.function.name
                found[part.index] = [part.id, part.function.name, ""]
            found[part.index][2] += part.function.arguments or ""
    assert [(name, json.loads(arguments)) for _, name, arguments in found.values()] == [
        ("weather", {"city": "Oslo"}), ("clock", {}),
    ]
    assert len({id for id, _, _ in found.values()}) == 2
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    # The arguments come as they are written, and not at the end.
    pieces = [p for c in chunks for p in c.choices[0].delta.tool_calls or [] if p.index == 0]
    assert len(pieces) > 4


def test_the_choice_of_tools(ask):
    text = "Nothing to call for."
    assert ask(text, tool_choice="auto").choices[0].message.content == text
    for choice in ["required", {"type": "function", "function": {"name": "clock"}}]:
        [(name, arguments)] = calls(ask(call("clock"), tool_choice=choice))
        assert (name, arguments) == ("clock", {})
    # Held to a call, whatever it would say.
    held = ask(text, tool_choice={"type": "function", "function": {"name": "clock"}})
    assert calls(held) == [("clock", {})]
    # Told of no tools, it cannot call one.
    none = ask(call("clock"), tool_choice="none").choices[0]
    assert none.finish_reason == "stop" and none.message.tool_calls is None
    for wrong in ["sometimes", {"type": "function", "function": {"name": "nothing"}}]:
        with pytest.raises(openai.BadRequestError, match="tool_choice"):
            ask(text, tool_choice=wrong)
    with pytest.raises(openai.BadRequestError, match="tool_choice needs tools"):
        ask(text, tools=[], tool_choice="required")


def test_one_call_at_a_time(ask):
    two = call("clock") + "\n" + call("clock")
    assert len(calls(ask(two, tool_choice="required"))) == 2
    assert len(calls(ask(two, tool_choice="required", parallel_tool_calls=False))) == 1


def test_results_go_back(ask):
    first = ask(call("weather", city="Oslo")).choices[0].message
    messages = [
        {"role": "user", "content": "How is it in Oslo?"},
        first.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "Rain."},
    ]
    # The model says its last line back.
    assert ask("", messages=messages).choices[0].message.content == "You said: Rain."
    messages[-1]["content"] = say("It rains.")
    assert ask("", messages=messages).choices[0].message.content == "It rains."


def test_who_knows_no_tools(server):
    client = openai.OpenAI(base_url=server.v1, api_key="none", max_retries=0)
    with pytest.raises(openai.BadRequestError, match="does not support tools"):
        client.chat.completions.create(model="plain", messages=user("x"), tools=functions())


def test_the_helper_for_tools_in_a_stream(server):
    client = openai.OpenAI(base_url=server.v1, api_key="none", max_retries=0)
    strict = functions()
    for tool in strict:
        tool["function"]["strict"] = True
    with client.chat.completions.stream(
        model="one", messages=user(call("weather", city="Oslo")), tools=strict
    ) as stream:
        done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
    assert [event.parsed_arguments for event in done] == [{"city": "Oslo"}]
