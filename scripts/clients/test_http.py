"""What the clients hide: headers, lines, events, pings, bodies that are no requests."""

import http.client
import json

import httpx
import pytest

import says
from says import call, functions, say, user


@pytest.fixture
def http_to(server):
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def post(client, path, body, **options):
    return client.post(path, json=body, **options)


def events(text):
    """Names and data of events."""
    found = []
    for block in text.strip().split("\n\n"):
        fields = [line.partition(": ")[::2] for line in block.split("\n")]
        assert all(name in ("event", "data", "") for name, _ in fields), block
        fields = dict(field for field in fields if field[0])
        if fields:
            found.append((fields.get("event"), fields["data"]))
    return found


def test_probes(http_to):
    assert http_to.get("/").text == "Ollama is running"
    for path in ["/", "/api/version", "/api/tags", "/health"]:
        answer = http_to.head(path)
        assert answer.status_code == 200 and answer.content == b""
    version = http_to.get("/api/version").json()["version"]
    assert [int(n) for n in version.split(".")] >= [0, 12, 0]
    assert http_to.get("/health").json() == http_to.get("/v1/health").json() == {"status": "ok"}
    assert http_to.get("/metrics").headers["content-type"].startswith("application/openmetrics-text")


def test_lines(http_to):
    answer = post(http_to, "/api/chat", {"model": "one", "messages": user("ab")})
    assert answer.headers["content-type"] == "application/x-ndjson"
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert [line["message"]["content"] for line in lines] == ["a", "b", ""]
    assert set(lines[0]) == {"model", "created_at", "message", "done"}
    assert set(lines[-1]) == set(lines[0]) | {
        "done_reason", "total_duration", "load_duration", "prompt_eval_count", "prompt_eval_duration", "eval_count",
        "eval_duration",
    }
    whole = post(http_to, "/api/chat", {"model": "one", "messages": user("ab"), "stream": False})
    assert whole.headers["content-type"] == "application/json"
    # Bodies are JSON, whatever curl says that they are.
    body = json.dumps({"model": "one", "prompt": say("ab")})
    form = {"content-type": "application/x-www-form-urlencoded"}
    answer = http_to.post("/api/generate", content=body, headers=form)
    assert answer.headers["content-type"] == "application/x-ndjson"
    assert set(json.loads(answer.text.splitlines()[-1])) >= {"response", "context", "eval_count"}


def test_calls_in_lines(http_to):
    body = {"model": "one", "messages": user(call("weather", city="Oslo") + call("clock")), "tools": functions()}
    lines = [json.loads(line) for line in post(http_to, "/api/chat", body).text.splitlines()]
    calls = [call for line in lines for call in line["message"].get("tool_calls", [])]
    # The arguments are an object here, and a text in the other dialect.
    assert [call["function"] for call in calls] == [
        {"index": 0, "name": "weather", "arguments": {"city": "Oslo"}}, {"index": 1, "name": "clock", "arguments": {}},
    ]
    assert all(call["id"] for call in calls)


def test_events(http_to):
    body = {"model": "one", "messages": user("ab"), "stream": True}
    answer = post(http_to, "/v1/chat/completions", body)
    assert answer.headers["content-type"] == "text/event-stream"
    assert answer.headers["cache-control"] == "no-cache" and answer.headers["x-accel-buffering"] == "no"
    found = events(answer.text)
    assert found[-1] == (None, "[DONE]") and all(name is None for name, _ in found)
    assert [data for _, data in found].count("[DONE]") == 1
    chunk = json.loads(found[1][1])
    assert chunk["choices"] == [{"index": 0, "delta": {"content": "a"}, "finish_reason": None, "logprobs": None}]
    assert set(chunk) == {"id", "object", "created", "model", "system_fingerprint", "choices"}
    texts = post(http_to, "/v1/completions", {"model": "one", "prompt": "a", "max_tokens": 1, "stream": True})
    assert events(texts.text)[-1] == (None, "[DONE]")


def test_events_with_names(http_to):
    for path, body, last in [
        ("/v1/responses", {"input": say("ab")}, "response.completed"),
        ("/v1/messages", {"messages": user("ab"), "max_tokens": 9}, "message_stop"),
    ]:
        answer = post(http_to, path, {"model": "one", "stream": True} | body)
        assert answer.headers["content-type"] == "text/event-stream"
        found = events(answer.text)
        assert all(name == json.loads(data)["type"] for name, data in found)
        assert found[-1][0] == last


def test_events_of_errors(http_to):
    body = {"model": "one", "messages": user("a FAIL~ NOW"), "stream": True}
    found = events(post(http_to, "/v1/chat/completions", body).text)
    assert json.loads(found[-2][1])["error"]["message"] == "the script says so" and found[-1][1] == "[DONE]"
    name, data = events(post(http_to, "/v1/messages", body | {"max_tokens": 99}).text)[-1]
    assert name == "error" and json.loads(data)["error"]["type"] == "api_error"
    lines = post(http_to, "/api/chat", body).text.splitlines()
    assert json.loads(lines[-1]) == {"error": "the script says so"}


def test_pings(start):
    server = start(gate=1, ping=1)
    body = {"model": "one", "messages": user("a"), "stream": True}
    with httpx.stream("POST", server.url + "/v1/chat/completions", json=body) as answer:
        lines = answer.iter_lines()
        # It waits before the prompt is read, and is alive.
        assert next(line for line in lines if line.startswith(":")) == ": ping"
        server.tell("open 100")
        assert "data: [DONE]" in list(lines)


def test_bodies_that_are_no_requests(http_to):
    told = {
        "/api/chat": lambda body: body["error"],
        "/v1/chat/completions": lambda body: body["error"]["message"],
        "/v1/messages": lambda body: body["type"] == "error" and body["error"]["message"],
    }
    for path, message in told.items():
        for content in [b"{", b"[]", b"null", b"\xff", b'{"model": 5}', b'{"model": "one", "messages": 1}', b"[" * 9999]:
            answer = http_to.post(path, content=content)
            assert answer.status_code == 400 and message(answer.json()), (path, content)
            assert answer.headers["content-type"] == "application/json"
        answer = http_to.post(path, content=b'{"model": "' + b"x" * (9 << 20) + b'"}')
        assert answer.status_code == 413 and message(answer.json())
        answer = http_to.get(path)
        assert answer.status_code == 405 and message(answer.json()) and "POST" in answer.headers["allow"]
        answer = http_to.post(path + "/nothing")
        assert answer.status_code == 404 and message(answer.json())
    # What nobody knows is passed over.
    body = {"model": "one", "messages": user("a"), "stream": False, "frobnicate": {"a": [1]}}
    assert post(http_to, "/api/chat", body).json()["message"]["content"] == "a"


def test_hosts_and_origins(http_to):
    assert http_to.get("/api/tags", headers={"host": "evil.example"}).status_code == 403
    assert http_to.get("/api/tags", headers={"origin": "https://evil.example"}).status_code == 403
    own = http_to.get("/api/tags", headers={"origin": "http://localhost:3000"})
    assert own.headers["access-control-allow-origin"] == "http://localhost:3000"
    asks = {"origin": "http://localhost:3000", "access-control-request-method": "POST",
            "access-control-request-headers": "authorization,content-type"}
    assert http_to.options("/v1/chat/completions", headers=asks).status_code == 200


def test_keys(start):
    server = start(key="secret")
    with httpx.Client(base_url=server.url) as client:
        for path in ["/", "/health"]:
            assert client.get(path).status_code == 200
        for path in ["/api/tags", "/v1/models", "/metrics", "/props"]:
            assert client.get(path).status_code == 401
            assert client.get(path, headers={"authorization": "Bearer wrong"}).status_code == 401
            assert client.get(path, headers={"authorization": "Bearer secret"}).status_code in (200, 404)
            assert client.get(path, headers={"x-api-key": "secret"}).status_code in (200, 404)
        assert client.get("/api/tags").json()["error"]
        assert client.get("/v1/models").json()["error"]["code"] == "invalid_api_key"
        assert client.post("/v1/messages").json()["type"] == "error"


def test_tokens(http_to):
    answer = post(http_to, "/tokenize", {"model": "one", "content": "aé", "add_special": True}).json()
    assert answer == {"tokens": [256, 97, 0xC3, 0xA9]}
    pieces = post(http_to, "/tokenize", {"content": "aé", "with_pieces": True}).json()["tokens"]
    assert pieces == [{"id": 97, "piece": "a"}, {"id": 0xC3, "piece": [0xC3]}, {"id": 0xA9, "piece": [0xA9]}]
    assert post(http_to, "/detokenize", {"tokens": [97, 0xC3, 0xA9]}).json() == {"content": "aé"}
    props = http_to.get("/props").json()
    assert props["model_alias"] == "one" and props["default_generation_settings"]["n_ctx"] == 4096


def test_one_connection_for_several_requests(server):
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"))
    for _ in range(3):
        connection.request("POST", "/api/chat", json.dumps({"model": "one", "messages": user("a")}))
        first = connection.sock
        assert connection.getresponse().read()
        assert connection.sock is first is not None
    connection.close()


def test_who_leaves_without_a_stream_frees_the_sequence(start):
    server = start(sequences=1, gate=1)
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"))
    body = json.dumps({"model": "one", "messages": user("x" * 1000), "stream": False})
    connection.request("POST", "/api/chat", body)
    says.end_midway(server, connection)
    answer = httpx.post(server.url + "/api/generate", json={"model": "one", "prompt": say("y"), "stream": False})
    assert answer.json()["response"] == "y"
