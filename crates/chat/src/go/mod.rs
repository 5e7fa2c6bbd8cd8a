//! The part of Go's `text/template` that Ollama's templates use, and the way Ollama fills them in
//! (ollama's `template/template.go`).
//!
//! No crate is used for it: `gtmpl`, the only one for Rust, has had no release for years, knows neither
//! `break`, `continue` nor `else with`, and cannot be limited in what it takes. `define`, `template` and
//! `block` are left out, which no chat template needs.

mod exec;
mod functions;
mod lex;
mod parse;
mod values;

use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::error::Result;
use crate::limits;
use crate::message::{Message, Think};
use crate::template::{Request, request_bytes};
use crate::time::DateTime;
use exec::Run;
use parse::Node;

/// A template that was read.
#[derive(Debug)]
pub(crate) struct GoTemplate {
    nodes: Vec<Node>,
    /// The same up to where the model goes on, for templates of one turn.
    opening: Vec<Node>,
    /// The names of fields and variables that it uses, in lower case.
    names: BTreeSet<String>,
}

impl GoTemplate {
    pub(crate) fn new(source: &str) -> Result<Self> {
        let mut nodes = parse::parse(source)?;
        let mut names = BTreeSet::new();
        parse::names(&nodes, &mut names);
        if !names.contains("messages") && !names.contains("response") {
            nodes.push(Node::response());
        }
        let opening = parse::up_to_response(&nodes);
        Ok(Self { nodes, opening, names })
    }

    /// Whether it has a field or a variable of that name, given in lower case.
    pub(crate) fn uses(&self, name: &str) -> bool {
        self.names.contains(name)
    }

    pub(crate) fn render(&self, request: &Request<'_>) -> Result<String> {
        let (system, messages) = collated(request.messages);
        let fuel = limits::fuel(request.messages.len(), request_bytes(request));
        let mut run = Run::new(request.now, fuel);
        if self.uses("messages") {
            let mut root = thinking(request.think);
            root["System"] = system.into();
            root["Messages"] = messages.iter().map(values::message).collect();
            root["Tools"] = request.tools.iter().map(values::tool).collect();
            root["Response"] = "".into();
            run.template(&self.nodes, &root)?;
        } else {
            self.by_turns(&mut run, &messages, request.think)?;
        }
        Ok(run.into_output())
    }

    pub(crate) fn insert(
        &self,
        prompt: &str,
        suffix: &str,
        think: Option<Think>,
        now: DateTime,
    ) -> Result<String> {
        let mut run = Run::new(now, limits::fuel(1, prompt.len() + suffix.len()));
        let mut root = thinking(think);
        root["Prompt"] = prompt.into();
        root["Suffix"] = suffix.into();
        root["Response"] = "".into();
        run.template(&self.nodes, &root)?;
        Ok(run.into_output())
    }

    /// A template of one turn is filled in once for each, and for the last one up to the response.
    fn by_turns(&self, run: &mut Run, messages: &[Message], think: Option<Think>) -> Result<()> {
        let mut turn = Turn::default();
        for message in messages {
            match message.role.as_str() {
                "system" => {
                    if !turn.prompt.is_empty() || !turn.response.is_empty() {
                        run.template(&self.nodes, &std::mem::take(&mut turn).root(think))?;
                    }
                    turn.system = message.content.clone();
                }
                "user" => {
                    if !turn.response.is_empty() {
                        run.template(&self.nodes, &std::mem::take(&mut turn).root(think))?;
                    }
                    turn.prompt = message.content.clone();
                }
                "assistant" => turn.response = message.content.clone(),
                _ => {}
            }
        }
        run.template(&self.opening, &turn.root(think))
    }
}

#[derive(Default)]
struct Turn {
    system: String,
    prompt: String,
    response: String,
}

impl Turn {
    fn root(self, think: Option<Think>) -> Value {
        let mut root = thinking(think);
        root["System"] = self.system.into();
        root["Prompt"] = self.prompt.into();
        root["Response"] = self.response.into();
        root
    }
}

fn thinking(think: Option<Think>) -> Value {
    json!({
        "Think": think.is_some_and(Think::is_on),
        "ThinkLevel": think.and_then(Think::level).unwrap_or_default(),
        "IsThinkSet": think.is_some(),
    })
}

/// All system messages, joined, and the messages with neighbours of one role joined, as Ollama does.
fn collated(messages: &[Message]) -> (String, Vec<Message>) {
    let system: Vec<&str> =
        messages.iter().filter(|m| m.role == "system").map(|m| m.content.as_str()).collect();
    let mut collated: Vec<Message> = Vec::with_capacity(messages.len());
    for message in messages {
        match collated.last_mut() {
            Some(last) if last.role == message.role && message.role != "tool" => {
                last.content += "\n\n";
                last.content += &message.content;
                last.tool_calls.extend(message.tool_calls.iter().cloned());
            }
            _ => collated.push(message.clone()),
        }
    }
    (system.join("\n\n"), collated)
}
