//! Replies in each family's format.

use std::fmt::Write;

use serde_json::json;
use tierstream_chat::{Delta, Parser, Reply, limits};

use crate::common::{format, parse, told, tools};

/// A family's template, whether its prompt ends in thinking, and replies.
pub(crate) struct Family {
    pub(crate) template: &'static str,
    pub(crate) opens_thinking: bool,
    pub(crate) replies: &'static [&'static str],
}

const fn family(template: &'static str, replies: &'static [&'static str]) -> Family {
    Family { template, opens_thinking: false, replies }
}

pub(crate) static FAMILIES: &[Family] = &[
    family(
        "qwen3.jinja",
        &[
            "",
            "Hello, world 🌍.",
            "  \n Hello \n",
            "<think>\nIt is α < β.\n</think>\n\nIt rains.",
            "<think>\n\n</think>\n\nNo thought.",
            "\n\n<think>Broken off \n",
            "<think>a</think>",
            "<thinking> is no mark",
            "a <think>b</think> c",
            "Let me look.\n<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Köln\", \"days\": 3}}\n</tool_call>",
            "<think>\nHm.\n</think>\n\n<tool_call>\n{\"name\": \"now\", \"arguments\": {}}\n</tool_call>\n<tool_call>\n{\"arguments\": {\"query\": \"a}b{\\\"</tool_call>\", \"exact\": true}, \"name\": \"search\"}\n</tool_call>\nDone.",
            "<tool_call>{\"name\":\"now\"}</tool_call>",
            "<tool_call>{\"name\":\"now\",\"arguments\":null,\"x\":1.5e3}</tool_call>",
            "<tool_call>{\"name\":\"now\",\"arguments\":\"{\\\"a\\\": 1}\"}</tool_call>",
            "<tool_call>{\"id\":\"c1\",\"type\":\"function\",\"name\":\"other\",\"arguments\":{\"a\":{\"b\":[{}]}}}</tool_call>",
            "<tool_call>{\"name\": \"now\", \"arguments\": {\"a\": ",
            "<tool_call>{\"name\": \"no",
            "<tool_call>\n",
            "<tool_ca",
            "Use <tool_call> as you like, or </tool_call>.",
            "<tool_call>{\"no\": \"call\"}</tool_call>",
            "<tool_call>{\"name\": \"a b\", \"arguments\": {}}</tool_call>",
            "<tool_call>{\"name\": \"now\", \"arguments\": {\"a\": tru}}</tool_call> after",
            "<tool_call>{\"name\": \"now\", \"arguments\": [1]}</tool_call> after",
            "<tool_call>{\"name\": \"now\", \"arguments\": {}, \"arguments\": {\"b\": 1}}</tool_call>",
            "<tool_call>[{\"name\": \"now\", \"arguments\": {}}, {\"name\": \"search\", \"arguments\": {\"query\": \"\"}}]</tool_call> ok",
            "<think>I call <tool_call>{\"name\": \"now\", \"arguments\": {}}</tool_call>",
            "<think>I call <tool_call>{\"name\": \"now\", \"arguments\": {}}</tool_call>\n</think>\n\nDone.",
            "<think>I could <tool_call> it </think> or not",
            "{\"name\": \"now\", \"arguments\": {}}",
            "a < b << c <t <to <too",
        ],
    ),
    Family {
        template: "deepseek-r1.jinja",
        opens_thinking: true,
        replies: &[
            "Thinking.\n</think>\n\nAnswer.",
            "\n \n</think>Answer.",
            "Thinking on",
            "<think>\nOnce more.</think>Answer.",
            "x</think>\n\n<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n{\"city\": \"東京\"}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
            "</think><｜tool▁calls▁begin｜>and nothing more",
            "</think><｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{} after",
            "</think>```json\n{}\n```",
        ],
    },
    family(
        "deepseek-v3.1.jinja",
        &[
            "Yes.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{\"city\": \"Rome\"}<｜tool▁call▁end｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get weather<｜tool▁sep｜>{}<｜tool▁call▁end｜>",
        ],
    ),
    family(
        "llama3.jinja",
        &[
            "{\"name\": \"get_weather\", \"parameters\": {\"city\": \"Oslo\"}}",
            " {\"type\": \"function\", \"name\": \"now\", \"parameters\": {}}; {\"name\": \"search\", \"parameters\": {\"query\": \"q\", \"exact\": false}}<|eom_id|>",
            "<|python_tag|>{\"name\": \"now\", \"parameters\": {}}",
            "<|python_tag|>print(1)",
            "{\"name\": \"unknown\", \"parameters\": {}}",
            "{\"city\": \"Oslo\"}",
            "{\"parameters\": {\"city\": \"Oslo\"}, \"name\": \"get_weather\"}",
            "{\"name\": \"now\"} and more",
            "{",
            "Say {\"name\": \"now\", \"parameters\": {}}",
        ],
    ),
    family(
        "mistral-v3.jinja",
        &[
            "[TOOL_CALLS] [{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Lyon\"}, \"id\": \"abcdefghi\"}, {\"name\": \"now\", \"arguments\": {}, \"id\": \"123456789\"}]",
            "[TOOL_CALLS][{\"name\": \"now\", \"arguments\": {}}] and text",
            "[TOOL_CALLS][]",
            "[TOOL_CALLS]",
            "[TOOL_CALLS] [{\"name\": \"now\", \"arguments\": {}}, 1]",
            "[TOOL is [TOOL_CALL",
            "[TOOL_CALLS]now{\"a\": 1}",
        ],
    ),
    family(
        "mistral-tekken.jinja",
        &[
            "[THINK]Hm.[/THINK]Answer",
            "Well.[TOOL_CALLS]get_weather[ARGS]{\"city\": \"Nice\"}[TOOL_CALLS]now[CALL_ID]abc123456[ARGS]{}",
            "[TOOL_CALLS]now[ARGS]",
            "[TOOL_CALLS]it is[ARGS]{}",
            "[THINK]a [TOOL_CALLS]now[ARGS]{}",
        ],
    ),
    family("gemma3.jinja", &["Text.", "{\"name\": \"now\", \"arguments\": {}}"]),
    family(
        "gpt-oss.jinja",
        &[
            "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes.<|return|>",
            "<|channel|>analysis<|message|>Call.<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{\"city\": \"Bonn\"}<|call|>",
            " to=functions.now<|channel|>commentary<|constrain|>json<|message|>{}<|call|>",
            "<|channel|>commentary<|message|>First.<|end|><|start|>assistant<|channel|>commentary to=functions.now<|message|>{}<|call|><|start|>assistant<|channel|>commentary to=functions.search json<|message|>{\"query\": \"<|end|>\"}<|call|>",
            "<|channel|>commentary to=functions.now<|message|>not json<|call|>",
            "<|channel|>commentary to=functions.now<|message|>{\"a\": nonsense}<|call|>",
            "<|channel|>commentary to=functions.now<|message|>",
            "<|channel|>final",
            "<|channel|>final<|mess",
            "Plain text to=nobody <|en",
            "<|channel|>final<|message|>a<|channel|>analysis<|message|>b",
            "<|channel|>final <|constrain|>json<|message|>{\"a\": 1}",
        ],
    ),
    family(
        "command-r7b.jinja",
        &[
            "<|START_THINKING|>Plan.<|END_THINKING|><|START_ACTION|>[\n    {\"tool_call_id\": \"0\", \"tool_name\": \"get_weather\", \"parameters\": {\"city\": \"Turin\"}},\n    {\"tool_call_id\": \"1\", \"tool_name\": \"now\", \"parameters\": {}}\n]<|END_ACTION|>",
            "<|START_THINKING|>Plan.<|END_THINKING|><|START_RESPONSE|>Yes.<|END_RESPONSE|>",
            "<|START_RESPONSE|>Yes.",
        ],
    ),
    family(
        "phi4.jinja",
        &[
            "<|tool_call|>[{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Ulm\"}}]<|/tool_call|>",
            "functools[{\"name\": \"now\", \"arguments\": {}}]",
            "import functools as f, or functools[1]",
        ],
    ),
    family(
        "glm4.5.jinja",
        &[
            "\n<think>Hm.</think>\nYes.",
            "<think></think>\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>New\nYork</arg_value>\n<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n</tool_call>\n<tool_call>now\n</tool_call>",
            "<tool_call>search<arg_key>query</arg_key><arg_value>12</arg_value><arg_key>exact</arg_key><arg_value>True</arg_value><arg_key>tags</arg_key><arg_value>[\"a\"]</arg_value><arg_key>limit</arg_key><arg_value>null</arg_value><arg_key>other</arg_key><arg_value>{\"a\"</arg_value></tool_call>",
            "<tool_call>get weather\n</tool_call>",
            "<tool_call>now\n<arg_key>a</arg_key>\nno value",
            "<tool_call>now\n<arg_key>a",
            "<tool_call>now",
        ],
    ),
    family(
        "qwen3-coder.jinja",
        &[
            "Now.\n\n<tool_call>\n<function=get_weather>\n<parameter=city>\nNew\n\nYork\n</parameter>\n<parameter=days>\n4\n</parameter>\n</function>\n</tool_call>",
            "<function=now>\n</function>\n</tool_call>\n<tool_call>\n<function=search>\n<parameter=query>\n<b>&amp;</b>\n</parameter>\n<parameter=filter>\n{\"a\": [1, 2]}\n</parameter>\n</function>\n</tool_call>",
            "<tool_call>\n<function=",
            "<function=a b>\n</function>",
            "<tool_call>text",
        ],
    ),
    family(
        "kimi-k2.jinja",
        &[
            "Yes.<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>{\"city\": \"Xi'an\"}<|tool_call_end|><|tool_call_begin|>functions.now:1<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>",
            "<|tool_calls_section_begin|><|tool_call_begin|>now<|tool_call_argument_begin|>{}<|tool_call_end|>",
        ],
    ),
    Family {
        template: "minimax-m2.jinja",
        opens_thinking: true,
        replies: &[
            "Hm.\n</think>\n\nYes.\n<minimax:tool_call>\n<invoke name=\"get_weather\">\n<parameter name=\"city\">Wien</parameter>\n<parameter name=\"days\">5</parameter>\n</invoke>\n<invoke name=\"now\">\n</invoke>\n</minimax:tool_call>",
            "<invoke name=\"now\">\n</invoke>",
        ],
    },
    family(
        "seed-oss.jinja",
        &[
            "<seed:think>Hm.</seed:think>Yes.<seed:tool_call>\n<function=get_weather>\n<parameter=city>Wien</parameter>\n</function>\n</seed:tool_call>",
        ],
    ),
    family(
        "granite3.jinja",
        &[
            "<|tool_call|>[{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Brno\"}}, {\"name\": \"now\", \"arguments\": {}}]",
        ],
    ),
];

#[test]
fn replies_of_all_families() {
    for Family { template, opens_thinking, replies } in FAMILIES {
        let mut all = String::new();
        for reply in *replies {
            let deltas = parse(&format(template), &tools(), *opens_thinking, [*reply]);
            let _ = write!(all, "{reply:?}\n{}\n", told(&deltas));
        }
        insta::with_settings!({omit_expression => true}, {
            insta::assert_snapshot!(format!("replies_{template}"), all);
        });
    }
}

#[test]
fn without_tools_there_are_no_calls() {
    for Family { template, opens_thinking, replies } in FAMILIES {
        for reply in *replies {
            let deltas = parse(&format(template), &[], *opens_thinking, [*reply]);
            let is_text = |d: &Delta| matches!(d, Delta::Thinking(_) | Delta::Content(_));
            assert!(deltas.iter().all(is_text), "{reply}: {deltas:?}");
        }
    }
}

#[test]
fn text_comes_at_once_and_marks_never_in_part() {
    let mut parser = Parser::new(&format("qwen3.jinja"), &tools(), false);
    let content = |text: &str| vec![Delta::Content(text.into())];
    assert_eq!(parser.feed("Well"), content("Well"));
    assert_eq!(parser.feed(" <"), content(" "));
    assert_eq!(parser.feed("tool_"), []);
    assert_eq!(parser.feed("box"), content("<tool_box"));
    assert_eq!(parser.feed("<tool_call>"), []);
    assert_eq!(parser.feed("{\"name\": \"now\", "), []);
    let start = Delta::ToolStart { index: 0, id: None, name: "now".into() };
    let json = |text: &str| Delta::ToolArguments { index: 0, json_fragment: text.into() };
    assert_eq!(parser.feed("\"arguments\": {\"a"), [start, json("{\"a")]);
    assert_eq!(parser.feed("\": 1"), [json("\": 1")]);
    assert_eq!(parser.feed("}"), [json("}")]);
    assert!(matches!(parser.feed("}")[..], [Delta::ToolEnd { index: 0, .. }]));
}

#[test]
fn thinking_is_told_while_it_lasts() {
    let mut parser = Parser::new(&format("qwen3.jinja"), &tools(), true);
    assert!(parser.is_thinking());
    assert_eq!(parser.feed("Hm"), [Delta::Thinking("Hm".into())]);
    assert!(parser.is_thinking());
    parser.feed("</think>");
    assert!(!parser.is_thinking());
    let mut parser = Parser::new(&format("gpt-oss.jinja"), &tools(), false);
    parser.feed("<|channel|>analysis<|message|>");
    assert!(parser.is_thinking());
    parser.feed("<|end|>");
    assert!(!parser.is_thinking());
}

/// What reads all of the text, whatever it is, and gives it back.
fn content(template: &str, reply: &str) -> String {
    let mut given = Reply::default();
    given.extend(parse(&format(template), &tools(), false, [reply]));
    assert_eq!(given.tool_calls, []);
    given.content
}

#[test]
fn too_much_before_a_call_is_text() {
    let reply = "<tool_call>".repeat(1000) + "{\"name\": \"now\"}";
    let mut marks_only = Reply::default();
    marks_only.extend(parse(&format("qwen3.jinja"), &tools(), false, [reply.as_str()]));
    // The last marks are few enough again.
    assert_eq!(marks_only.tool_calls.len(), 1);
    assert!(marks_only.content.starts_with("<tool_call><tool_call>"));
    let reply = format!("<tool_call>{}x", " ".repeat(limits::CALL_HEADER_BYTES));
    assert_eq!(content("qwen3.jinja", &reply), reply);
    let reply = format!("[TOOL_CALLS]{}{{}}", "a".repeat(limits::CALL_HEADER_BYTES + 1));
    assert_eq!(content("mistral-v3.jinja", &reply), reply);
    let reply = format!("<function={}>", "a".repeat(limits::NAME_BYTES + 1));
    assert_eq!(content("qwen3-coder.jinja", &reply), reply);
    let reply = format!("<|channel|>{}<|message|>", "a".repeat(limits::CALL_HEADER_BYTES));
    assert_eq!(content("gpt-oss.jinja", &reply), reply);
}

#[test]
fn a_call_has_as_many_bytes_as_it_may_and_no_more() {
    let (before, after) = ("{\"name\": \"now\", \"arguments\": {\"a\": \"", "\"}}");
    for (more, calls) in [(0, 1), (1, 0)] {
        let letters = limits::CALL_BYTES - before.len() - after.len() + more;
        let reply = format!("<tool_call>{before}{}{after}", "a".repeat(letters));
        let pieces = |bytes: usize| {
            let parts = reply.as_bytes().chunks(bytes);
            parts.map(|part| std::str::from_utf8(part).expect("these are ASCII"))
        };
        let whole = parse(&format("qwen3.jinja"), &tools(), false, [reply.as_str()]);
        for bytes in [4099, 1_000_003] {
            let cut = parse(&format("qwen3.jinja"), &tools(), false, pieces(bytes));
            assert!(whole == cut, "{bytes}");
        }
        let mut given = Reply::default();
        given.extend(whole);
        assert_eq!(given.tool_calls.len(), calls);
    }
}

#[test]
fn deep_arguments_are_no_call() {
    for (deep, calls) in [(limits::JSON_DEPTH - 1, 1), (limits::JSON_DEPTH, 0), (1_000_000, 0)] {
        let json = "[".repeat(deep) + &"]".repeat(deep);
        let reply = format!("<tool_call>{{\"name\":\"now\",\"arguments\":{{\"a\":{json}}}}}");
        let mut given = Reply::default();
        given.extend(parse(&format("qwen3.jinja"), &tools(), false, [reply.as_str()]));
        assert_eq!(given.tool_calls.len(), calls, "{deep}");
    }
}

#[test]
fn calls_are_counted() {
    for (template, call) in [
        ("qwen3.jinja", "<tool_call>{\"name\":\"now\"}</tool_call>"),
        ("glm4.5.jinja", "<tool_call>now\n</tool_call>"),
        ("mistral-tekken.jinja", "[TOOL_CALLS]now[ARGS]{}"),
        ("llama3.jinja", "{\"name\":\"now\"};"),
        ("gpt-oss.jinja", "<|channel|>commentary to=functions.now<|message|>{}<|call|>"),
    ] {
        let reply = call.repeat(limits::CALLS + 1);
        let mut given = Reply::default();
        given.extend(parse(&format(template), &tools(), false, [reply.as_str()]));
        assert_eq!(given.tool_calls.len(), limits::CALLS, "{template}");
        assert!(!given.content.is_empty(), "{template}");
    }
}

#[test]
fn values_in_tags_get_the_types_of_the_schema() {
    let cases = [
        ("query", "12", json!("12")),
        ("query", "true", json!("true")),
        ("query", "null", json!("null")),
        ("query", "\"quoted\"", json!("\"quoted\"")),
        ("query", "{\"a\": 1}", json!("{\"a\": 1}")),
        ("query", "", json!("")),
        ("exact", "false", json!(false)),
        ("exact", "True", json!(true)),
        ("exact", "maybe", json!("maybe")),
        ("tags", "[\"a\", \"b\"]", json!(["a", "b"])),
        ("tags", "a, b", json!("a, b")),
        ("filter", "{\"a\": [1]}", json!({"a": [1]})),
        ("limit", "3.5", json!(3.5)),
        ("limit", "null", json!(null)),
        ("limit", "None", json!(null)),
        ("unknown", "3", json!(3)),
        ("unknown", "three", json!("three")),
    ];
    for (key, text, value) in cases {
        let reply =
            format!("<function=search>\n<parameter={key}>\n{text}\n</parameter>\n</function>");
        let mut given = Reply::default();
        given.extend(parse(&format("qwen3-coder.jinja"), &tools(), false, [reply.as_str()]));
        assert_eq!(given.tool_calls[0].arguments, json!({ key: value }), "{key}: {text}");
    }
}
