//! Grammars that hold a model to its format: what they take is what the parser reads.

use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::ApproximateTokEnv;
use llguidance::{Matcher, ParserFactory};
use serde_json::json;
use tierstream_chat::{Delta, Format, GrammarOptions, Reply, Which};

use crate::common::{format, parse, tools};

/// Whether a grammar takes all of a text.
fn takes(grammar: &str, text: &str) -> bool {
    let tokens = ApproximateTokEnv::single_byte_env();
    let mut factory = ParserFactory::new_simple(&tokens).expect("a vocabulary of bytes");
    factory.quiet();
    let parser = factory.create_parser(TopLevelGrammar::from_lark(grammar.to_owned()));
    let mut matcher = Matcher::new(parser);
    assert!(matcher.get_error().is_none(), "{:?}\n{grammar}", matcher.get_error());
    let bytes: Vec<u32> = text.bytes().map(u32::from).collect();
    let all = matcher.try_consume_tokens(&bytes).is_ok_and(|taken| taken == bytes.len());
    all && matcher.is_accepting().unwrap_or(false)
}

fn calls(format: &Format, which: Which<'_>, options: GrammarOptions) -> String {
    format.tool_grammar(&tools(), which, options).expect("there is such a tool")
}

const PARALLEL: GrammarOptions = GrammarOptions { parallel: true, thinks_first: false };

/// A template, a reply of two calls, and where the first one ends.
const REPLIES: [(&str, &str, &str); 15] = [
    (
        "qwen3",
        "<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\":\"Köln\"}}\n</tool_call>",
        "\n<tool_call>\n{\"name\": \"now\", \"arguments\": {}}\n</tool_call>",
    ),
    (
        "deepseek-r1",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n{\"city\":\"Köln\"}\n```<｜tool▁call▁end｜>",
        "\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    ),
    (
        "deepseek-v3.1",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{\"city\":\"Köln\"}<｜tool▁call▁end｜>",
        "<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    ),
    (
        "llama3",
        "{\"name\": \"get_weather\", \"parameters\": {\"city\":\"Köln\"}}",
        "; {\"name\": \"now\", \"parameters\": {}}",
    ),
    (
        "mistral-v3",
        "[TOOL_CALLS][{\"name\": \"get_weather\", \"arguments\": {\"city\":\"Köln\"}}",
        ", {\"name\": \"now\", \"arguments\": {}}]",
    ),
    (
        "mistral-tekken",
        "[TOOL_CALLS]get_weather[ARGS]{\"city\":\"Köln\"}",
        "[TOOL_CALLS]now[ARGS]{}",
    ),
    (
        "granite3",
        "<|tool_call|>[{\"name\": \"get_weather\", \"arguments\": {\"city\":\"Köln\"}}",
        ", {\"name\": \"now\", \"arguments\": {}}]",
    ),
    (
        "command-r7b",
        "<|START_ACTION|>[{\"tool_call_id\": \"0\", \"tool_name\": \"get_weather\", \"parameters\": {\"city\":\"Köln\"}}",
        ", {\"tool_call_id\": \"1\", \"tool_name\": \"now\", \"parameters\": {}}]<|END_ACTION|>",
    ),
    (
        "kimi-k2",
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>{\"city\":\"Köln\"}<|tool_call_end|>",
        "<|tool_call_begin|>functions.now:1<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>",
    ),
    (
        "glm4.5",
        "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Köln</arg_value>\n</tool_call>",
        "\n<tool_call>now\n</tool_call>",
    ),
    (
        "qwen3-coder",
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nKöln\n</parameter>\n</function>\n</tool_call>",
        "\n<tool_call>\n<function=now>\n</function>\n</tool_call>",
    ),
    (
        "seed-oss",
        "<seed:tool_call>\n<function=get_weather>\n<parameter=city>\nKöln\n</parameter>\n</function>\n</seed:tool_call>",
        "\n<seed:tool_call>\n<function=now>\n</function>\n</seed:tool_call>",
    ),
    (
        "minimax-m2",
        "<minimax:tool_call>\n<invoke name=\"get_weather\">\n<parameter name=\"city\">Köln</parameter>\n</invoke>",
        "\n<invoke name=\"now\">\n</invoke>\n</minimax:tool_call>",
    ),
    (
        "gemma3",
        "<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\":\"Köln\"}}\n</tool_call>",
        "\n<tool_call>\n{\"name\": \"now\", \"arguments\": {}}\n</tool_call>",
    ),
    (
        "gpt-oss",
        "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{\"city\":\"Köln\"}",
        "",
    ),
];

#[test]
fn what_a_grammar_takes_is_read_as_calls() {
    for (name, first, second) in REPLIES {
        let format = format(&format!("{name}.jinja"));
        let reply = format!("{first}{second}");
        let grammar = calls(&format, Which::All, PARALLEL);
        assert!(takes(&grammar, &reply), "{name}: {reply}\n{grammar}");
        assert!(!takes(&grammar, &format!("{reply}x")), "{name}\n{grammar}");
        assert!(!takes(&grammar, &reply.replace("get_weather", "other")), "{name}\n{grammar}");
        // The city has to be there, or be a string.
        assert!(!takes(&grammar, &reply.replace("city", "days")), "{name}\n{grammar}");
        let mut given = Reply::default();
        given.extend(parse(&format, &tools(), false, [reply.as_str()]));
        assert_eq!(given.tool_calls[0].name, "get_weather", "{name}");
        assert_eq!(given.tool_calls[0].arguments, json!({"city": "Köln"}), "{name}");
        assert_eq!(given.tool_calls.len(), if second.is_empty() { 1 } else { 2 }, "{name}");
        assert_eq!((given.content.as_str(), given.thinking.as_str()), ("", ""), "{name}");
        if !second.is_empty() {
            let one = calls(&format, Which::All, GrammarOptions::default());
            assert!(!takes(&one, &reply), "{name}\n{one}");
            let named = calls(&format, Which::Named("get_weather"), PARALLEL);
            assert!(!takes(&named, &reply), "{name}\n{named}");
        }
    }
}

#[test]
fn thinking_goes_on_first() {
    let options = GrammarOptions { parallel: false, thinks_first: true };
    let call = "<tool_call>\n{\"name\": \"now\", \"arguments\": {}}\n</tool_call>";
    let grammar = calls(&format("qwen3.jinja"), Which::Named("now"), options);
    assert!(takes(&grammar, &format!("Hm. <tool_call>\n</think>\n\n{call}")));
    assert!(!takes(&grammar, call));
    let harmony = calls(&format("gpt-oss.jinja"), Which::All, GrammarOptions::default());
    let call = "<|channel|>commentary to=functions.now <|constrain|>json<|message|>{}";
    assert!(takes(&harmony, call));
    assert!(takes(
        &harmony,
        &format!("<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant{call}")
    ));
}

#[test]
fn answers_of_a_schema() {
    let schema =
        json!({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]});
    for (name, before, after) in [
        ("qwen3", "", ""),
        ("llama3", "", ""),
        ("gpt-oss", "<|channel|>final<|message|>", ""),
        (
            "gpt-oss",
            "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>",
            "",
        ),
        ("command-r7b", "<|START_RESPONSE|>", "<|END_RESPONSE|>"),
    ] {
        let format = format(&format!("{name}.jinja"));
        let grammar = format.json_grammar(&schema, false);
        let reply = format!("{before}{{\"a\": 1}}{after}");
        assert!(takes(&grammar, &reply), "{name}\n{grammar}");
        assert!(!takes(&grammar, &reply.replace('1', "\"1\"")), "{name}\n{grammar}");
        let mut given = Reply::default();
        given.extend(parse(&format, &[], false, [reply.as_str()]));
        assert_eq!(given.content, "{\"a\": 1}", "{name}");
    }
    let grammar = format("qwen3.jinja").json_grammar(&schema, true);
    assert!(takes(&grammar, "Hm.</think>\n\n{\"a\": 1}"));
    assert!(!takes(&grammar, "{\"a\": 1}"));
}

#[test]
fn arguments_in_tags_have_the_types_of_the_schema() {
    let grammar = calls(&format("glm4.5.jinja"), Which::Named("search"), PARALLEL);
    let argument = |key: &str, value: &str| {
        format!("<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n")
    };
    let call = |arguments: &[(&str, &str)]| {
        let arguments: String = arguments.iter().map(|(k, v)| argument(k, v)).collect();
        format!("<tool_call>search\n{arguments}</tool_call>")
    };
    assert!(takes(&grammar, &call(&[("query", "<any> \"text\""), ("exact", "true")])));
    assert!(takes(
        &grammar,
        &call(&[("query", ""), ("exact", "true"), ("tags", "[\"a\"]"), ("limit", "null")])
    ));
    assert!(!takes(&grammar, &call(&[("query", "a"), ("exact", "yes")])));
    assert!(!takes(&grammar, &call(&[("query", "a")])));
    assert!(!takes(&grammar, &call(&[("query", "a"), ("exact", "true"), ("other", "1")])));
    let grammar = calls(&format("qwen3-coder.jinja"), Which::Named("get_weather"), PARALLEL);
    let call = |unit: &str| {
        format!(
            "<tool_call>\n<function=get_weather>\n<parameter=city>\na\n</parameter>\n<parameter=unit>\n{unit}\n</parameter>\n</function>\n</tool_call>"
        )
    };
    assert!(takes(&grammar, &call("C")));
    assert!(!takes(&grammar, &call("K")));
}

#[test]
fn a_tool_that_is_not_there_has_no_grammar() {
    let format = format("qwen3.jinja");
    assert_eq!(format.tool_grammar(&tools(), Which::Named("other"), PARALLEL), None);
    assert_eq!(format.tool_grammar(&[], Which::All, PARALLEL), None);
}

/// Cut by a limit of tokens, for one.
#[test]
fn a_call_that_is_cut_leaves_no_text() {
    for (name, first, second) in REPLIES {
        let format = format(&format!("{name}.jinja"));
        let reply = format!("{first}{second}");
        for (cut, _) in reply.char_indices() {
            let deltas = parse(&format, &tools(), false, [&reply[..cut]]);
            let starts = |delta: &&Delta| matches!(delta, Delta::ToolStart { .. });
            let started = deltas.iter().filter(starts).count();
            let mut given = Reply::default();
            given.extend(deltas);
            // What begins a call may be text, until it is one.
            if started == 2 || started == 1 && cut <= first.len() {
                assert_eq!(given.content, "", "{name}: {}", &reply[..cut]);
            }
        }
    }
}

#[test]
fn objects_have_the_keys_that_they_are_said_to_have() {
    let takes = |schema: serde_json::Value, json: &str| {
        takes(&format("gemma3.jinja").json_grammar(&schema, false), json)
    };
    let point =
        json!({"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]});
    let more = r#"{"x":1,"y":2}"#;
    assert!(takes(point.clone(), r#"{"x":1}"#) && !takes(point.clone(), more));
    let mut open = point.clone();
    open["additionalProperties"] = true.into();
    assert!(takes(open.clone(), more));
    assert!(takes(json!({"type": "object"}), more));
    // At any depth.
    for within in [
        json!({"type": "array", "items": point}),
        json!({"type": "array", "prefixItems": [point], "minItems": 1}),
        json!({"type": "array", "items": {"$ref": "#/$defs/p"}, "$defs": {"p": point}}),
        json!({"type": "array", "items": {"anyOf": [{"type": "null"}, point]}}),
    ] {
        assert!(takes(within.clone(), r#"[{"x":1}]"#), "{within}");
        assert!(!takes(within.clone(), &format!("[{more}]")), "{within}");
    }
    // What has to be there may be.
    let mut vague = point;
    vague["required"] = json!(["x", "y"]);
    assert!(takes(vague, more));
    // A key of that name is none of the schema's words.
    let named = json!({"type": "object", "properties": {"properties": {"type": "object"}}});
    assert!(takes(named, r#"{"properties":{"x":1}}"#));
    // The parts would rule each other out.
    let part = |key: &str| json!({"type": "object", "properties": {key: {"type": "integer"}}, "required": [key]});
    assert!(takes(json!({"allOf": [part("x"), part("y")]}), more));
}
