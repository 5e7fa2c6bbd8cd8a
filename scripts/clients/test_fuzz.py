"""schemathesis: requests of all kinds, made from the server's own document, for FUZZ_SECONDS."""

import os
import pathlib
import re
import subprocess
import sys

import httpx
import pytest

from says import say

HERE = pathlib.Path(__file__).parent
SECONDS = int(os.environ.get("FUZZ_SECONDS", "60"))


@pytest.mark.timeout(SECONDS + 120)
def test_no_request_fails_or_hangs(start, tmp_path):
    # A short context: what holds an answer to a form may have it go on to the end.
    server = start(ctx=512)
    told = subprocess.run(
        [
            pathlib.Path(sys.executable).with_name("st"), "--config-file", HERE / "schemathesis.toml",
            "run", server.url + "/openapi.json", "--max-time", str(SECONDS), "--request-timeout", "30",
            "--workers", "2", "--warnings", "off", "--no-color",
        ],
        env=os.environ | {"SCHEMATHESIS_HOOKS": "hooks", "PYTHONPATH": str(HERE)},
        # Where it may leave files.
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )
    assert told.returncode == 0, told.stdout
    print(told.stdout[told.stdout.rfind("Test cases"):])
    # Nothing is left of them.
    answer = httpx.post(server.url + "/api/generate", json={"model": "one", "prompt": say("a"), "stream": False})
    assert answer.json()["response"] == "a"
    assert server.metric("llamacpp:requests_processing") == server.metric("llamacpp:requests_deferred") == 0
    # Most of them were computed, and not refused at once. It begins with those that are refused.
    cases = int(re.search(r"(\d+) generated", told.stdout)[1])
    assert cases < 1000 or server.metric("llamacpp:n_decode_total") > 100
