"""All clients of Python before the program itself, with a model that computes.

It is small, and knows nothing of chats: what it says is looked at only where something else holds it.
"""

import json
import math
import os

# Or it fetches its list of models and prices.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import anthropic
import langchain_ollama
import langchain_openai
import litellm
import ollama
import openai
import pytest

import says

CITY = {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"],
        "additionalProperties": False}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "The weather", "parameters": CITY}}]
FORM = {"type": "json_schema", "json_schema": {"name": "sky", "strict": True, "schema": says.COLOURS}}
ASK = [{"role": "user", "content": "It was a cold evening in November."}]
# One, or it would call until it has no tokens left.
ONE_CALL = {"tool_choice": "required", "parallel_tool_calls": False}
RESULT = {"role": "tool", "tool_call_id": "1", "content": "Rain.", "tool_name": "weather"}


def is_form(text):
    value = json.loads(text)
    return set(value) == {"sky", "rains"} and value["sky"] in ["blue", "grey"]


def are_embeddings(vectors):
    """Two, of length 1, that are not the same."""
    one, two = vectors
    return len(one) == len(two) > 8 and one != two and math.isclose(sum(x * x for x in one), 1, abs_tol=1e-3)


def test_openai(demo):
    client = openai.OpenAI(base_url=demo.v1, api_key="none", max_retries=0)
    ask = dict(model="story", messages=ASK, max_tokens=200, temperature=0)
    short = ask | {"max_tokens": 12}
    whole = client.chat.completions.create(**short)
    assert whole.choices[0].message.content and whole.usage.completion_tokens <= 12
    streamed = client.chat.completions.create(**short, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in streamed)
    assert text == whole.choices[0].message.content
    assert is_form(client.chat.completions.create(**ask, response_format=FORM).choices[0].message.content)
    called = client.chat.completions.create(**ask, tools=TOOLS, **ONE_CALL)
    for call in called.choices[0].message.tool_calls:
        assert call.function.name == "weather" and json.loads(call.function.arguments)["city"] in ["Oslo", "Rome"]
    back = ASK + [called.choices[0].message.model_dump(exclude_none=True), RESULT]
    assert client.chat.completions.create(**short | {"messages": back}, tools=TOOLS).choices[0].finish_reason
    assert are_embeddings([e.embedding for e in client.embeddings.create(model="story", input=["a", "no b"]).data])
    tokens = client.chat.completions.create(**short, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    # The likeliest tokens are drawn at temperature 0.
    assert all(token.logprob == token.top_logprobs[0].logprob <= 0 for token in tokens)


def test_the_same_seed_gives_the_same_text(demo):
    client = openai.OpenAI(base_url=demo.v1, api_key="none", max_retries=0)
    ask = lambda seed: client.completions.create(
        model="demo", prompt="It was", max_tokens=24, temperature=1, seed=seed
    ).choices[0].text
    assert ask(1) == ask(1) and len({ask(seed) for seed in range(4)}) > 1


def test_responses(demo):
    client = openai.OpenAI(base_url=demo.v1, api_key="none", max_retries=0)
    ask = dict(model="story", input=ASK, max_output_tokens=200, temperature=0)
    short = ask | {"max_output_tokens": 12}
    whole = client.responses.create(**short)
    with client.responses.stream(**short) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
    assert text == whole.output_text != ""
    form = {"type": "json_schema", "name": "sky", "schema": says.COLOURS}
    assert is_form(client.responses.create(**ask, text={"format": form}).output_text)
    tools = [{"type": "function", "name": "weather", "parameters": CITY, "strict": True}]
    called = client.responses.create(**ask, tools=tools, **ONE_CALL)
    assert all(item.type == "function_call" and json.loads(item.arguments) for item in called.output)


def test_ollama(demo):
    client = ollama.Client(host=demo.url)
    short = dict(model="story", messages=ASK, options={"num_predict": 12})
    whole = client.chat(**short)
    assert whole.message.content and whole.eval_count <= 12
    assert "".join(part.message.content for part in client.chat(**short, stream=True)) == whole.message.content
    assert is_form(client.chat(model="story", messages=ASK, format=says.COLOURS).message.content)
    back = ASK + [{"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Oslo"}}}]},
                  {"role": "tool", "tool_name": "weather", "content": "Rain."}]
    assert client.chat(**short | {"messages": back}, tools=TOOLS).done
    assert are_embeddings(client.embed(model="story", input=["a", "no b"]).embeddings)
    assert "story" in client.ps().models[0].model and "tools" in client.show("story").capabilities
    assert any(model.model.startswith("story") for model in client.list().models)
    assert client.generate(model="story", keep_alive=0).done_reason == "unload"
    assert not any("story" in model.model for model in client.ps().models)


def test_anthropic(demo):
    client = anthropic.Anthropic(base_url=demo.url, api_key="none", max_retries=0)
    ask = dict(model="story", messages=ASK, max_tokens=200, extra_body={"temperature": 0})
    short = ask | {"max_tokens": 12}
    whole = client.messages.create(**short)
    with client.messages.stream(**short) as stream:
        assert "".join(stream.text_stream) == whole.content[0].text != ""
    tools = [{"name": "weather", "input_schema": CITY}]
    called = client.messages.create(**ask, tools=tools, tool_choice={"type": "tool", "name": "weather"})
    assert called.content[0].input["city"] in ["Oslo", "Rome"]
    assert client.messages.count_tokens(model="story", messages=ASK).input_tokens > 5


@pytest.mark.parametrize("dialect", ["openai", "ollama"])
def test_langchain(demo, dialect):
    if dialect == "openai":
        make = lambda most: langchain_openai.ChatOpenAI(
            model="story", base_url=demo.v1, api_key="none", temperature=0, max_tokens=most, max_retries=0
        )
        embeddings = langchain_openai.OpenAIEmbeddings(
            model="story", base_url=demo.v1, api_key="none", check_embedding_ctx_length=False
        )
        called = make(200).bind_tools(TOOLS, tool_choice="weather").invoke("How is it in Oslo?")
        assert called.tool_calls[0]["args"]["city"] in ["Oslo", "Rome"]
    else:
        make = lambda most: langchain_ollama.ChatOllama(
            model="story", base_url=demo.url, temperature=0, num_predict=most
        )
        embeddings = langchain_ollama.OllamaEmbeddings(model="story", base_url=demo.url)
        assert make(12).bind_tools(TOOLS).invoke("How is it in Oslo?").response_metadata["done"]
    whole = make(12).invoke("It was")
    assert "".join(part.content for part in make(12).stream("It was")) == whole.content != ""
    form = says.COLOURS | {"title": "sky", "description": "The sky"}
    value = make(200).with_structured_output(form, method="json_schema").invoke("It was")
    assert value["sky"] in ["blue", "grey"]
    assert are_embeddings(embeddings.embed_documents(["a", "no b"]))


def test_litellm(demo):
    ask = dict(model="openai/story", api_base=demo.v1, api_key="none", messages=ASK, temperature=0, num_retries=0)
    whole = litellm.completion(**ask, max_tokens=12).choices[0].message.content
    parts = litellm.completion(**ask, max_tokens=12, stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == whole != ""
    assert is_form(litellm.completion(**ask, max_tokens=200, response_format=FORM).choices[0].message.content)
    called = litellm.completion(**ask, max_tokens=200, tools=TOOLS, **ONE_CALL)
    assert called.choices[0].message.tool_calls[0].function.name == "weather"
    answer = litellm.embedding(model="openai/story", input=["a", "no b"], api_base=demo.v1, api_key="none")
    assert are_embeddings([item["embedding"] for item in answer.data])
