//! Renders chats, for `scripts/oracle_chat.py`: a case as JSON on each line of standard input, what comes
//! of it as JSON on a line of standard output.

use std::io::{BufRead, Write};

use serde::Deserialize;
use serde_json::{Value, json};
use tierstream_chat::{DateTime, Message, Request, Template, Think, Tool, ToolCall};

#[derive(Deserialize)]
struct Case {
    template: String,
    #[serde(default)]
    is_go: bool,
    #[serde(default)]
    bos: String,
    #[serde(default)]
    eos: String,
    messages: Vec<Turn>,
    #[serde(default)]
    tools: Vec<Tool>,
    think: Option<String>,
    #[serde(default)]
    add_generation_prompt: bool,
    #[serde(default)]
    now: i64,
    suffix: Option<String>,
}

#[derive(Deserialize)]
#[serde(default)]
#[derive(Default)]
struct Turn {
    role: String,
    content: String,
    thinking: Option<String>,
    tool_calls: Vec<Call>,
    tool_call_id: Option<String>,
    tool_name: Option<String>,
}

#[derive(Deserialize)]
struct Call {
    id: Option<String>,
    name: String,
    arguments: Value,
}

impl From<Turn> for Message {
    fn from(turn: Turn) -> Self {
        let calls = turn.tool_calls.into_iter();
        Self {
            role: turn.role,
            content: turn.content,
            thinking: turn.thinking,
            tool_calls: calls
                .map(|c| ToolCall { id: c.id, name: c.name, arguments: c.arguments })
                .collect(),
            tool_call_id: turn.tool_call_id,
            tool_name: turn.tool_name,
        }
    }
}

fn rendered(case: Case) -> tierstream_chat::Result<String> {
    let template = if case.is_go {
        Template::go(&case.template)?
    } else {
        Template::jinja(&case.template, &case.bos, &case.eos)?
    };
    let think = case.think.as_deref().map(|think| match think {
        "off" => Think::Off,
        "low" => Think::Low,
        "medium" => Think::Medium,
        "high" => Think::High,
        _ => Think::On,
    });
    let now = DateTime::from_unix(case.now);
    let messages: Vec<Message> = case.messages.into_iter().map(Message::from).collect();
    if let Some(suffix) = case.suffix {
        let prompt = messages.first().map_or("", |message| message.content.as_str());
        return template.insert(prompt, &suffix, think, now);
    }
    let add_generation_prompt = case.add_generation_prompt;
    let request = Request {
        tools: &case.tools,
        think,
        add_generation_prompt,
        ..Request::new(&messages, now)
    };
    template.render(&request)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    for line in std::io::stdin().lock().lines() {
        let told = match rendered(serde_json::from_str(&line?)?) {
            Ok(text) => json!({"text": text}),
            Err(error) => json!({"error": error.to_string()}),
        };
        writeln!(out, "{told}")?;
    }
    Ok(out.flush()?)
}
