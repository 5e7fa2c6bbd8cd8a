//! Any text as a chat template of either kind, with limits on what it takes, and as a reply in any format:
//! how the reply is cut makes no difference.
//!
//! `cargo +nightly fuzz run chat fuzz/corpus/chat fuzz/seeds/chat`

#![no_main]

use libfuzzer_sys::fuzz_target;
use tierstream_chat::{
    DateTime, Delta, Error, Format, Message, Parser, Request, Template, Think, Tool, ToolCall,
};

/// What tells the formats apart, and the rest of what a template is asked for.
const FORMATS: [&str; 16] = [
    "",
    "<think><tool_call>",
    "<|channel|><|message|>",
    "<｜tool▁call▁begin｜>```</think>",
    "<｜tool▁call▁begin｜>",
    "<|tool_call_begin|><think>",
    "<minimax:tool_call><think>",
    "<seed:tool_call><seed:think>",
    "<arg_key><think>",
    "<function=<parameter=",
    "[TOOL_CALLS][ARGS][THINK]",
    "[TOOL_CALLS]",
    "<|START_ACTION|><|START_THINKING|>",
    "<|tool_call|>",
    "<|tool|>",
    "<|python_tag|>",
];

fuzz_target!(|bytes: &[u8]| {
    let Some((&[kind, step, first], rest)) = bytes.split_first_chunk() else { return };
    let Ok(text) = std::str::from_utf8(rest) else { return };
    if kind & 0x40 == 0 {
        reply(FORMATS[usize::from(kind & 15)], kind & 0x10 != 0, step, first, text);
    } else {
        template(kind, text);
    }
});

fn tools() -> Vec<Tool> {
    let parameters = serde_json::json!({
        "type": "object",
        "properties": {"a": {"type": "string"}, "b": {"type": ["integer", "null"]}},
        "required": ["a"],
    });
    let function = serde_json::json!({"name": "f", "description": "é", "parameters": parameters});
    vec![serde_json::from_value(serde_json::json!({"function": function})).expect("a tool")]
}

fn template(kind: u8, text: &str) {
    let tools = tools();
    let template =
        if kind & 1 == 0 { Template::jinja(text, "<s>", "") } else { Template::go(text) };
    let Ok(template) = template else { return };
    let call = ToolCall {
        id: Some("123456789".into()),
        name: "f".into(),
        arguments: serde_json::json!({"a": "é", "b": 1}),
    };
    let messages = [
        Message::new("system", "s"),
        Message::new("user", "u"),
        Message {
            thinking: Some("t".into()),
            tool_calls: vec![call],
            ..Message::new("assistant", "")
        },
        Message { tool_name: Some("f".into()), ..Message::new("tool", "r") },
    ];
    let now = DateTime::from_unix(0);
    let think = [None, Some(Think::Off), Some(Think::High)][usize::from(kind >> 1) % 3];
    let tools = if kind & 8 == 0 { &tools[..] } else { &[] };
    let request = Request { tools, think, ..Request::new(&messages, now) };
    match template.render(&request) {
        // What is made of it is paid for, at 64 bytes a unit.
        Ok(text) => assert!(text.len() < 1 << 28, "{} bytes", text.len()),
        Err(error) => assert!(!matches!(error, Error::NoInsert)),
    }
    let _ = template.insert("a", "b", think, now);
}

fn reply(source: &str, opens_thinking: bool, step: u8, first: u8, text: &str) {
    let format = Format::detect(source);
    let tools = tools();
    let mut whole = Parser::new(&format, &tools, opens_thinking);
    let mut all = whole.feed(text);
    all.extend(whole.finish());

    let mut cut = Parser::new(&format, &tools, opens_thinking);
    let mut pieces = Vec::new();
    let mut rest = text;
    let mut size = usize::from(first) + 1;
    while !rest.is_empty() {
        let (piece, after) = rest.split_at(rest.ceil_char_boundary(size.min(rest.len())));
        pieces.extend(cut.feed(piece));
        rest = after;
        size = usize::from(step) % 16 + 1;
    }
    pieces.extend(cut.finish());
    assert_eq!(joined(all), joined(pieces), "{source} {text:?}");
}

fn joined(deltas: Vec<Delta>) -> Vec<Delta> {
    let mut all: Vec<Delta> = Vec::new();
    for delta in deltas {
        match (all.last_mut(), delta) {
            (Some(Delta::Thinking(last)), Delta::Thinking(text))
            | (Some(Delta::Content(last)), Delta::Content(text)) => *last += &text,
            (
                Some(Delta::ToolArguments { index: last, json_fragment }),
                Delta::ToolArguments { index, json_fragment: text },
            ) if *last == index => *json_fragment += &text,
            (_, delta) => all.push(delta),
        }
    }
    all
}
