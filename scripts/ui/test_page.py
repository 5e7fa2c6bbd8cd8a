"""What the page does in front of a server of scripted models."""

import re

import pytest
from playwright.sync_api import expect

PHONE = {"viewport": {"width": 360, "height": 780}, "device_scale_factor": 2, "has_touch": True, "is_mobile": True}
LOOKS = {
    "light": {"color_scheme": "light"},
    "dark": {"color_scheme": "dark"},
    "phone": PHONE | {"color_scheme": "dark"},
}


def requests(view):
    """Of the last minute, as the summary has them."""
    found = re.search(r"([\d,]+) requests", view.at("#summary").inner_text())
    return int(found[1].replace(",", "")) if found else 0


def test_a_chat_streams_and_the_map_moves(start, look):
    server = start(gate=1)
    view = look(server)
    expect(view.at("#link")).to_have_text("Live")
    expect(view.at("#no-model")).to_be_visible()
    expect(view.at("#experts")).to_be_hidden()
    said = " ".join(["The tide comes in over the flats, slower than it looks."] * 4)
    view.send(f"SAY[{said}]YAS")
    server.tell("reached")
    expect(view.at("#models")).to_contain_text("1 of 4 sequences busy")
    expect(view.at("#experts")).to_be_visible()
    expect(view.at("#stop")).to_be_visible()
    before, cold, text = requests(view), view.cold(), ""
    for _ in range(3):
        # Of the prompt first, then a letter each.
        server.tell("open 20")
        expect(view.at("#summary")).not_to_contain_text(f" {before:,} requests" if before else "No requests")
        now = requests(view)
        assert now > before
        before = now
        expect(view.at("#log .model .text")).to_contain_text(re.compile(re.escape(text) + r".{10}"))
        text = view.at("#log .model .text").inner_text()
        assert said.startswith(text)
        expect(view.at("#stop")).to_be_visible()
    assert view.cold() < cold, "experts that were asked for are of another color"
    server.tell("open 100000")
    expect(view.at("#log .model .more")).to_contain_text(f"{len(said)} tokens")
    assert view.at("#log .model .text").inner_text() == said
    # Who does not see it is told the whole.
    expect(view.at("#said")).to_have_text(f"one: {said}")
    expect(view.at("#send")).to_be_visible()
    expect(view.at("#models")).to_contain_text("0 of 4 sequences busy")
    expect(view.at("#written .more")).to_contain_text("written since it was loaded")
    view.check()


def test_what_was_said_goes_with_the_next_message(start, look):
    view = look(start())
    view.send("SAY[first]YAS")
    expect(view.at("#log .model .more")).to_have_count(1)
    with view.page.expect_request("**/api/chat") as asked:
        view.send("SAY[second]YAS")
    assert [message["content"] for message in asked.value.post_data_json["messages"]] == [
        "SAY[first]YAS", "first", "SAY[second]YAS"]
    expect(view.at("#log .model .more")).to_have_count(2)
    view.at("#clear").click()
    expect(view.at("#log li")).to_have_count(0)
    view.check()


def test_what_is_cleared_is_gone(start, look):
    server = start(gate=1)
    view = look(server)
    view.send("SAY[" + "a" * 200 + "]YAS")
    server.tell("reached")
    server.tell("open 40")
    expect(view.at("#log .model .text")).to_contain_text("aaaaaaaa")
    view.at("#clear").click()
    expect(view.at("#log li")).to_have_count(0)
    expect(view.at("#send")).to_be_visible()
    server.tell("open 100000")
    with view.page.expect_request("**/api/chat") as asked:
        view.send("SAY[anew]YAS")
    assert asked.value.post_data_json["messages"] == [{"role": "user", "content": "SAY[anew]YAS"}]
    expect(view.at("#log .model .text")).to_have_text("anew")
    view.check()


def test_thinking_is_shown_apart(start, look):
    view = look(start())
    view.send("SAY[<think>hm, well</think>yes]YAS")
    expect(view.at("#log .model .more")).to_be_visible()
    expect(view.at("#log .model details div")).to_have_text("hm, well")
    expect(view.at("#said")).to_have_text("one: yes")
    view.check()


def test_keys_alone_will_do(start, look):
    server = start(gate=1)
    view = look(server)
    page = view.page
    expect(view.at("#model option")).not_to_have_count(0)

    def focused():
        """What has the focus; and whether that can be seen."""
        name, outline, width = page.evaluate("""() => {
            const { outlineStyle, outlineWidth } = getComputedStyle(document.activeElement);
            const { id, className, tagName } = document.activeElement;
            return [id || className || tagName, outlineStyle, parseFloat(outlineWidth)];
        }""")
        assert outline != "none" and width >= 2, name
        return name

    page.keyboard.press("Tab")
    assert focused() == "skip"
    page.keyboard.press("Enter")
    assert focused() == "prompt"
    page.keyboard.type("SAY[" + "a" * 200 + "]YAS")
    page.keyboard.press("Enter")
    server.tell("reached")
    server.tell("open 40")
    expect(view.at("#log .model .text")).to_contain_text("aaaaaaaa")
    page.keyboard.press("Escape")
    expect(view.at("#log .model")).to_contain_text("Stopped")
    expect(view.at("#said")).to_have_text("Stopped")
    expect(view.at("#models")).to_contain_text("0 of 4 sequences busy")

    # All that can be used, from the prompt back to the map.
    order = []
    while (name := focused()) != "map":
        order.append(name)
        page.keyboard.press("Shift+Tab")
    assert order == ["prompt", "log", "clear", "model", "SUMMARY"]
    page.keyboard.press("ArrowRight")
    expect(view.at("#cell")).to_contain_text("Layer 1, expert 0: ")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("End")
    expect(view.at("#cell")).to_contain_text("Layer 2, expert 15: ")
    page.keyboard.press("PageDown")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Home")
    expect(view.at("#cell")).to_contain_text("Layer 6, expert 0: ")
    page.keyboard.press("Escape")
    expect(view.at("#cell")).to_be_empty()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(view.at("#table tbody tr")).to_have_count(6)
    page.keyboard.press("Tab")
    assert focused() == "scrolls"
    view.check()


def test_the_table_has_what_the_map_shows(start, look):
    server = start()
    view = look(server)
    # The first state is what differences are taken from.
    view.send("SAY[x]YAS")
    expect(view.at("#experts")).to_be_visible()
    view.send("SAY[" + "some words " * 10 + "]YAS")
    expect(view.at("#log .model .more")).to_have_count(2)
    view.at("#table summary").click()
    expect(view.at("#summary")).to_contain_text("of which")
    rows = [row.split("\t") for row in view.at("#table tbody").inner_text().split("\n") if row]
    number = lambda text: int(text.replace(",", ""))
    for layer, row in enumerate(rows, start=1):
        assert number(row[0]) == layer
        assert number(row[1]) == sum(map(number, row[2:5]))
        assert row[5].endswith("%") and 0 <= number(row[6]) < 16
    assert sum(number(row[1]) for row in rows) == requests(view)
    view.check()


def test_colors_follow_the_system(start, look):
    server = start()
    color = lambda view: view.page.evaluate("getComputedStyle(document.body).backgroundColor")
    light, dark = [look(server, color_scheme=scheme) for scheme in ("light", "dark")]
    assert color(light) != color(dark)
    dark.page.emulate_media(color_scheme="light")
    assert color(light) == color(dark)


def test_nothing_moves_for_who_wants_that(start, look):
    moves = "getComputedStyle(document.querySelector('.meter i')).transitionDuration"
    server = start()
    assert look(server, reduced_motion="no-preference").page.evaluate(moves) != "0s"
    assert look(server, reduced_motion="reduce").page.evaluate(moves) == "0s"


@pytest.mark.parametrize("name", LOOKS)
def test_it_is_accessible_and_fits(start, look, name):
    view = look(start(), **LOOKS[name])
    expect(view.at("#link")).to_have_text("Live")
    view.check_access()
    view.check()
    view.send("SAY[" + "a_long_word_without_any_place_to_break_it" * 3 + "]YAS")
    expect(view.at("#log .model .more")).to_be_visible()
    expect(view.at("#experts")).to_be_visible()
    view.at("#table summary").click()
    expect(view.at("#table tbody tr")).to_have_count(6)
    view.check_access()
    view.check()


def model(load, name, layers, **others):
    """A model's state, as a server with more to show would tell it."""
    return {
        "name": name, "load": load, "architecture": "qwen3moe", "parameters": "235.1B", "quantization": "Q4_K_M",
        "context_tokens": 32768, "load_seconds": 12.5, "rests_seconds": None, "ram_bytes": 60 << 30,
        "vram_bytes": 70 << 30, "sequences": {"all": 4, "busy": 1, "waiting": 2},
        "tokens": {"prompt": 0, "written": 0}, "expert_bytes": 130 << 30,
        "pools": [{"tier": "vram", "bytes": 64 << 30, "filled_bytes": 20 << 30},
                  {"tier": "ram", "bytes": 48 << 30, "filled_bytes": 48 << 30}],
        "drive": {"bytes": 0, "limit_bytes_per_second": None},
        "gpu": {"bytes": 0, "limit_bytes_per_second": 63e9},
        "evictions": 0, "layers": layers, "notes": ["reads go through the page cache: it is tmpfs"],
    } | others


def tell_states(view, states):
    """Has the page told these states, one after the other, the last one for ever."""
    shown = {"version": "0.1.0", "run": 2, "time": 0.0}

    def answer(route):
        shown["time"] += 1.0
        models = states.pop(0) if len(states) > 1 else states[0]
        route.fulfill(json=shown | {"models": models})

    view.page.route("**/ui/state", answer)


@pytest.mark.parametrize("name", LOOKS)
def test_a_large_model_on_a_gpu(start, look, name):
    view = look(start(), **LOOKS[name])
    layer = lambda block, n: {"block": block, "vram": 6 * n, "ram": n, "drive": n,
                              "uses": [(2**32 - 4 + n * (expert % 7)) % 2**32 for expert in range(256)]}
    told = lambda n: [model(7, "hf.co/some-owner/a-model-with-a-rather-long-name-GGUF:Q4_K_M", [
        layer(block, n) for block in range(3, 94)],
        tokens={"prompt": 0, "written": 12 * n}, drive={"bytes": n * 10**9, "limit_bytes_per_second": 7e9},
        gpu={"bytes": n * 20 * 10**9, "limit_bytes_per_second": 63e9})]
    tell_states(view, [told(1), told(2)])
    expect(view.at("#summary")).to_have_text(
        "91 layers of 256 experts. In the last minute 728 requests, of which 91 had to be read. Layer 3 reads most.")
    expect(view.at("#gpu")).to_be_visible()
    expect(view.at("#gpu .more")).to_have_text("of 63.0 GB/s of the link")
    expect(view.at("#drive .more")).to_have_text("of 7.00 GB/s measured")
    expect(view.at("#found .value")).to_have_text("88 %")
    expect(view.at("#pools")).to_contain_text("20.0 GiB of 64.0 GiB filled")
    expect(view.at("#pools")).to_contain_text("48.0 GiB, full: 37 % of the experts")
    expect(view.at("#models")).to_contain_text("1 of 4 sequences busy · 2 waiting")
    expect(view.at("#notes")).to_contain_text("tmpfs")
    view.check_access()
    view.check()


def test_a_model_that_is_in_place_as_a_whole(start, look):
    view = look(start())
    tell_states(view, [[model(1, "small", [], pools=[], expert_bytes=0, gpu=None)]])
    expect(view.at("#held")).to_be_visible()
    expect(view.at("#experts")).to_be_hidden()
    expect(view.at("#found")).to_be_hidden()
    view.check_access()
    view.check()


def test_a_pool_that_has_all_experts(start, look):
    view = look(start())
    layers = lambda n: [{"block": block, "vram": 0, "ram": 8 * n, "drive": 0, "uses": []} for block in range(4)]
    tell_states(view, [[model(1, "all", layers(n), gpu=None)] for n in (1, 2)])
    expect(view.at("#summary")).to_contain_text("nobody looks which ones are used. In the last minute 32 requests")
    expect(view.at("#found .value")).to_have_text("100 %")
    view.check_access()
    view.check()


def test_one_of_several_models_is_chosen(start, look):
    view = look(start())
    layers = [{"block": 1, "vram": 0, "ram": 1, "drive": 1, "uses": [1, 1]}]
    tell_states(view, [[model(1, "one", layers), model(2, "two", [], gpu=None)]])
    expect(view.at("#models input")).to_have_count(2)
    expect(view.at("#models input").nth(1)).to_be_checked()
    expect(view.at("#held")).to_be_visible()
    view.at("#models input").nth(1).press("ArrowUp")
    expect(view.at("#experts")).to_be_visible()
    expect(view.at("#models input").nth(0)).to_be_checked()
    view.check_access()
    view.check()


def test_the_key_is_asked_for_and_kept_in_the_tab(start, look):
    server = start(key="secret")
    view = look(server)
    expect(view.at("#key")).to_be_visible()
    view.check_access()
    view.at("#key-text").fill("wrong")
    view.at("#key-text").press("Enter")
    expect(view.at("#key-why")).to_contain_text("does not know that key")
    expect(view.at("#key")).to_be_visible()
    view.at("#key-text").fill("secret")
    view.at("#key-text").press("Enter")
    expect(view.at("#link")).to_have_text("Live")
    expect(view.at("#key")).to_be_hidden()
    expect(view.at("#model option")).not_to_have_count(0)
    view.send("SAY[open]YAS")
    expect(view.at("#log .model .text")).to_have_text("open")
    stored = view.page.evaluate("[Object.values(sessionStorage), localStorage.length, document.cookie]")
    assert stored == [["secret"], 0, ""]
    view.page.reload()
    expect(view.at("#link")).to_have_text("Live")
    view.check(allowed="status of 401")
    expect(look(server).at("#key")).to_be_visible()


def test_failures_are_told(start, look):
    server = start()
    view = look(server)
    view.send("FAIL NOW")
    expect(view.at("#log .model .wrong")).to_contain_text("the script says so")
    expect(view.at("#said")).to_have_text("Failed: the script says so")
    view.send("SAY[still there]YAS")
    expect(view.at("#log .model .text").nth(1)).to_have_text("still there")
    server.process.kill()
    expect(view.at("#link")).to_have_text("No answer from the server")
    view.check(allowed="status of 5|ERR_CONNECTION")
