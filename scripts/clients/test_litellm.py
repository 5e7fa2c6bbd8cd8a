"""litellm: all dialects."""

import os

# Or it fetches its list of models and prices.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import json

import litellm
import pytest

import says
from says import call, functions, say, user


@pytest.fixture(params=["openai", "ollama_chat", "anthropic"])
def ask(request, server):
    base = server.v1 if request.param == "openai" else server.url

    def ask(text, model="one", **options):
        options = {"messages": user(text)} | options
        return litellm.completion(
            model=f"{request.param}/{model}", api_base=base, api_key="none", max_tokens=500, num_retries=0, **options
        )

    ask.dialect = request.param
    return ask


def test_chat(ask):
    answer = ask("Hello, you.")
    assert answer.choices[0].message.content == "Hello, you."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == len("Hello, you.") and answer.usage.prompt_tokens > 0


def test_stream(ask):
    parts = list(ask("Grüße", stream=True))
    assert "".join(part.choices[0].delta.content or "" for part in parts) == "Grüße"
    assert parts[-1].choices[0].finish_reason == "stop"


def test_tools(ask):
    answer = ask(call("weather", city="Oslo"), tools=functions())
    [made] = answer.choices[0].message.tool_calls
    assert (made.function.name, json.loads(made.function.arguments)) == ("weather", {"city": "Oslo"})
    messages = [
        {"role": "user", "content": "x"},
        answer.choices[0].message.model_dump(),
        {"role": "tool", "tool_call_id": made.id, "content": say("It rains.")},
    ]
    assert ask("", messages=messages, tools=functions()).choices[0].message.content == "It rains."


def test_tools_in_a_stream(ask):
    parts = list(ask(call("weather", city="Oslo"), tools=functions(), stream=True))
    whole = litellm.stream_chunk_builder(parts)
    [made] = whole.choices[0].message.tool_calls
    assert (made.function.name, json.loads(made.function.arguments)) == ("weather", {"city": "Oslo"})


def test_forms(ask):
    form = {"type": "json_schema", "json_schema": {"name": "colours", "schema": says.COLOURS, "strict": True}}
    said = '{"sky": "blue", "rains": false}'
    # For Anthropic's dialect the form is a tool.
    text = call("json_tool_call", sky="blue", rains=False) if ask.dialect == "anthropic" else said
    answer = ask(text, response_format=form)
    assert json.loads(answer.choices[0].message.content) == json.loads(said)


def test_errors(ask):
    with pytest.raises((litellm.NotFoundError, litellm.APIConnectionError), match="three"):
        ask("x", model="three")
    with pytest.raises((litellm.BadRequestError, litellm.APIConnectionError), match="context"):
        ask("x" * 5000)


def test_embeddings(server):
    for model, base in [("openai/one", server.v1), ("ollama/one", server.url)]:
        answer = litellm.embedding(model=model, input=["aei", "oo"], api_base=base, api_key="none")
        assert [item["embedding"] for item in answer.data] == [
            pytest.approx(says.unit(1, 1, 1, 0, 0)), pytest.approx(says.unit(0, 0, 0, 1, 0)),
        ]


def test_texts(server):
    answer = litellm.text_completion(
        model="text-completion-openai/one", prompt="abc", max_tokens=3, api_base=server.v1, api_key="none"
    )
    assert answer.choices[0].text == "def"
    answer = litellm.completion(model="ollama/one", messages=user("Hello."), api_base=server.url)
    assert answer.choices[0].message.content == "Hello."


def test_responses(server):
    answer = litellm.responses(model="openai/one", input=say("Hello."), api_base=server.v1, api_key="none")
    assert answer.output[0].content[0].text == "Hello."
