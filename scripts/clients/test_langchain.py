"""langchain-openai and langchain-ollama."""

import asyncio

import langchain_core.messages as messages
import langchain_ollama
import langchain_openai
import ollama
import openai
import pydantic
import pytest
from langchain_core.tools import tool

import says
from says import call, say


class Weather(pydantic.BaseModel):
    """The weather."""

    sky: str
    rains: bool


@tool
def weather(city: str) -> str:
    """The weather"""
    return say("It rains in " + city)


@pytest.fixture(params=["openai", "ollama"])
def chat(request, server):
    """Makes models of either package."""
    if request.param == "openai":
        return lambda model="one", **options: langchain_openai.ChatOpenAI(
            model=model, base_url=server.v1, api_key="none", max_retries=0, stream_usage=True, **options
        )
    return lambda model="one", **options: langchain_ollama.ChatOllama(model=model, base_url=server.url, **options)


def test_invoke(chat):
    answer = chat().invoke([("system", "Be brief."), ("human", say("Hello, you."))])
    assert answer.content == "Hello, you."
    assert answer.usage_metadata["output_tokens"] == len("Hello, you.")
    assert answer.usage_metadata["input_tokens"] > 0


def test_stream(chat):
    parts = list(chat().stream(say("Grüße")))
    whole = parts[0]
    for part in parts[1:]:
        whole += part
    assert whole.content == "Grüße" and len([part for part in parts if part.content]) == 5
    assert whole.usage_metadata["output_tokens"] == len("Grüße".encode())


def test_batch_and_async(chat):
    model = chat()
    texts = [f"number {n}" for n in range(5)]
    assert [answer.content for answer in model.batch(list(map(say, texts)))] == texts

    async def ask():
        return [part.content async for part in model.astream(say("abc"))]

    assert "".join(asyncio.run(ask())) == "abc"


def test_tools(chat):
    model = chat().bind_tools([weather])
    question = messages.HumanMessage(say(call("weather", city="Oslo")))
    answer = model.invoke([question])
    [made] = answer.tool_calls
    assert (made["name"], made["args"]) == ("weather", {"city": "Oslo"})
    result = weather.invoke(made)
    assert model.invoke([question, answer, result]).content == "It rains in Oslo"
    whole = None
    for part in model.stream([question]):
        whole = part if whole is None else whole + part
    assert [(made["name"], made["args"]) for made in whole.tool_calls] == [("weather", {"city": "Oslo"})]


def test_forms(chat):
    said = say('{"sky": "blue", "rains": false}')
    structured = chat().with_structured_output(Weather, method="json_schema")
    assert structured.invoke(said) == Weather(sky="blue", rains=False)
    called = chat().with_structured_output(Weather, method="function_calling")
    assert called.invoke(say(call("Weather", sky="grey", rains=True))) == Weather(sky="grey", rains=True)


def test_stop(chat):
    assert chat().invoke(say("one two three"), stop=["two"]).content == "one "


def test_errors(chat):
    with pytest.raises((openai.NotFoundError, ollama.ResponseError), match="three"):
        chat("three").invoke("x")
    with pytest.raises((openai.BadRequestError, ollama.ResponseError), match="context"):
        chat().invoke("x" * 5000)


def test_thinking(server):
    model = langchain_ollama.ChatOllama(model="one", base_url=server.url, reasoning=True)
    text = say("<think>\nWell.\n</think>\n\nYes.")
    answer = model.invoke(text)
    assert (answer.additional_kwargs["reasoning_content"].strip(), answer.content) == ("Well.", "Yes.")
    parts = list(model.stream(text))
    thought = "".join(part.additional_kwargs.get("reasoning_content", "") for part in parts)
    assert thought.strip() == "Well." and "".join(part.content for part in parts) == "Yes."


def test_responses(server):
    model = langchain_openai.ChatOpenAI(
        model="one", base_url=server.v1, api_key="none", max_retries=0, use_responses_api=True
    )
    assert model.invoke(say("Hello.")).text == "Hello."
    assert "".join(part.text for part in model.stream(say("Hello."))) == "Hello."
    assert model.bind_tools([weather]).invoke(say(call("weather", city="Oslo"))).tool_calls[0]["args"] == {"city": "Oslo"}


def test_logprobs(server):
    model = langchain_openai.ChatOpenAI(model="one", base_url=server.v1, api_key="none", logprobs=True, top_logprobs=2)
    tokens = model.invoke(say("ab")).response_metadata["logprobs"]["content"]
    assert [token["token"] for token in tokens] == ["a", "b"]


def test_embeddings(server):
    wanted = [pytest.approx(says.unit(1, 1, 1, 0, 0)), pytest.approx(says.unit(0, 0, 0, 1, 0))]
    of_ollama = langchain_ollama.OllamaEmbeddings(model="one", base_url=server.url)
    # Texts as they are: the package would send the tokens of a model of OpenAI's.
    of_openai = langchain_openai.OpenAIEmbeddings(
        model="one", base_url=server.v1, api_key="none", check_embedding_ctx_length=False
    )
    for model in [of_ollama, of_openai]:
        assert model.embed_documents(["aei", "oo"]) == wanted
        assert model.embed_query("aei") == wanted[0]


def test_texts(server):
    model = langchain_ollama.OllamaLLM(model="one", base_url=server.url)
    assert model.invoke(say("Hello.")) == "Hello."
    assert "".join(model.stream(say("Hello."))) == "Hello."
    model = langchain_openai.OpenAI(model="one", base_url=server.v1, api_key="none", max_tokens=3, max_retries=0)
    assert model.invoke("abc") == "def"
    assert "".join(model.stream("abc")) == "def"
