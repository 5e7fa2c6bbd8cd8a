//! Chats with everything that they may have in them.

use std::fmt::Write;

use serde_json::{Value, json};
use tierstream_chat::{DateTime, Message, Request, Template, Think, Tool, ToolCall};

use crate::common::tools;

/// 27 November 2026, 10:33:31.
pub(crate) const NOW: i64 = 1_795_775_611;

pub(crate) fn call(id: &str, name: &str, arguments: Value) -> ToolCall {
    ToolCall { id: Some(id.into()), name: name.into(), arguments }
}

/// A short chat of plain turns.
pub(crate) fn plain() -> Vec<Message> {
    vec![
        Message::new("system", "Be short."),
        Message::new("user", "Hi 😀"),
        Message::new("assistant", "Hello."),
        Message::new("user", "What is <b>?"),
    ]
}

/// One in which the model thinks, calls, and gets a result.
pub(crate) fn calling() -> Vec<Message> {
    let caller = Message {
        thinking: Some("Which city?".into()),
        tool_calls: vec![call("abcdefghi", "get_weather", json!({"days": 2, "city": "Köln"}))],
        ..Message::new("assistant", "")
    };
    let result = Message {
        tool_call_id: Some("abcdefghi".into()),
        tool_name: Some("get_weather".into()),
        ..Message::new("tool", "{\"degrees\": 3.0}")
    };
    vec![Message::new("user", "Weather?"), caller, result]
}

/// What a template makes of these chats, with its ways to think.
pub(crate) fn rendered(template: &Template) -> String {
    let tools = tools();
    let now = DateTime::from_unix(NOW);
    let (plain, calling) = (plain(), calling());
    let mut all = format!("{:?}\n", template.capabilities());
    let mut show = |title: &str, messages: &[Message], tools: &[Tool], think| {
        let request = Request { tools, think, ..Request::new(messages, now) };
        let text = match template.render(&request) {
            Ok(text) => text,
            Err(error) => format!("error: {error}"),
        };
        let _ = write!(all, "\n=== {title}\n{text}\n");
    };
    show("plain", &plain, &[], None);
    show("a tool's result", &calling, &tools, None);
    show("to think", &plain[1..2], &[], Some(Think::On));
    show("not to think", &plain[1..2], &[], Some(Think::Off));
    show("much", &plain[1..2], &tools[..1], Some(Think::High));
    all
}
