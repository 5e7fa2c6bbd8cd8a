//! Messages, tools and calls, in the shape that OpenAI's API gives them.

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// One message of a chat.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Message {
    /// `system`, `user`, `assistant`, `tool`, or what else the template knows.
    pub role: String,
    /// Its text; empty if there is none.
    pub content: String,
    /// What an assistant thought before.
    pub thinking: Option<String>,
    /// The calls that an assistant made.
    pub tool_calls: Vec<ToolCall>,
    /// In a tool's message, the call that it answers.
    pub tool_call_id: Option<String>,
    /// In a tool's message, the tool's name.
    pub tool_name: Option<String>,
}

impl Message {
    /// A message of text alone.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into(), ..Self::default() }
    }
}

/// A call of a tool.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ToolCall {
    /// Its id, if the model or the client gave one. Who serves clients makes one up where it is `None`.
    pub id: Option<String>,
    /// The tool's name.
    pub name: String,
    /// A JSON object; anything else is handed to templates as it is.
    pub arguments: Value,
}

/// A tool that the model may call, with OpenAI's keys.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Tool {
    /// `function`.
    #[serde(rename = "type", default = "function")]
    pub kind: String,
    /// What can be called.
    pub function: Function,
}

/// The function of a [`Tool`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Function {
    /// Its name.
    pub name: String,
    /// What it does, for the model to read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// A JSON schema of its arguments, an object; `null` if it takes none.
    #[serde(default)]
    pub parameters: Value,
}

fn function() -> String {
    "function".into()
}

impl Tool {
    /// The schema of the argument so named, if there is one.
    pub(crate) fn parameter(&self, name: &str) -> Option<&Value> {
        self.function.parameters.get("properties")?.get(name)
    }
}

/// Whether, and how much, the model is to think before it answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Think {
    /// Not at all, where the template can say so.
    Off,
    /// As much as the template has by default.
    On,
    /// A little.
    Low,
    /// More.
    Medium,
    /// Much.
    High,
}

impl Think {
    /// Whether it thinks at all.
    pub fn is_on(self) -> bool {
        self != Self::Off
    }

    /// `low`, `medium` or `high`, if one was asked for.
    pub fn level(self) -> Option<&'static str> {
        match self {
            Self::Off | Self::On => None,
            Self::Low => Some("low"),
            Self::Medium => Some("medium"),
            Self::High => Some("high"),
        }
    }
}
