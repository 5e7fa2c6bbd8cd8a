//! Schemas of what is read by hand, and of errors.

use schemars::{Schema, SchemaGenerator, json_schema};
use serde_json::{Value, json};

/// A text, or a list of texts.
pub(crate) fn texts(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}},
        {"type": "null"},
    ]})
}

/// A time in seconds, or such as `5m`.
pub(crate) fn keep_alive(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "description": "How long the model stays loaded: seconds, or a time such as 5m; 0: not at all, below 0: for ever",
        "type": ["string", "number", "null"],
        "examples": ["5m", 300, -1],
    })
}

/// Whether, or how much, is to be thought.
pub(crate) fn think(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"enum": [true, false, "low", "medium", "high", null]})
}

/// The form of an answer.
pub(crate) fn format(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "description": "json, or a JSON schema",
        "anyOf": [{"enum": ["json", "", null]}, {"type": "object"}],
    })
}

/// How much is to be thought.
pub(crate) fn effort(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"enum": ["none", "minimal", "low", "medium", "high", "xhigh", null]})
}

/// Which functions a model is to call.
pub(crate) fn tool_choice(_: &mut SchemaGenerator) -> Schema {
    let named = json!({
        "type": "object",
        "properties": {
            "type": {"const": "function"},
            "function": {
                "type": "object",
                "properties": {"name": {"type": "string"}},
                "required": ["name"],
            },
        },
        "required": ["function"],
    });
    json_schema!({"anyOf": [{"enum": ["none", "auto", "required", null]}, named]})
}

/// The form of an answer.
pub(crate) fn response_format(_: &mut SchemaGenerator) -> Schema {
    let json_schema = json!({
        "type": "object",
        "properties": {"schema": {"type": "object", "description": "A JSON schema"}},
        "required": ["schema"],
    });
    json_schema!({
        "type": ["object", "null"],
        "properties": {
            "type": {"enum": ["text", "json_object", "json_schema"]},
            "json_schema": json_schema,
        },
        "required": ["type"],
    })
}

/// A text, or a list of blocks: texts, thinking, calls and their results.
pub(crate) fn blocks(_: &mut SchemaGenerator) -> Schema {
    let block = json!({
        "type": "object",
        "properties": {
            "type": {"enum": ["text", "thinking", "redacted_thinking", "tool_use", "tool_result"]},
            "text": {"type": "string"},
        },
        "required": ["type", "text"],
    });
    json_schema!({"anyOf": [{"type": ["string", "null"]}, {"type": "array", "items": block}]})
}

/// Functions that a model may call.
pub(crate) fn tools(_: &mut SchemaGenerator) -> Schema {
    let function = json!({
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "description": {"type": ["string", "null"]},
            "parameters": {"type": "object", "description": "A JSON schema"},
        },
        "required": ["name"],
    });
    json_schema!({
        "type": ["array", "null"],
        "items": {
            "type": "object",
            "properties": {"type": {"const": "function"}, "function": function},
            "required": ["type", "function"],
        },
    })
}

pub(super) fn ollama_error() -> Value {
    json!({"type": "object", "properties": {"error": {"type": "string"}}, "required": ["error"]})
}

pub(super) fn openai_error() -> Value {
    let text = json!({"type": ["string", "null"]});
    json!({
        "type": "object",
        "properties": {"error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"}, "type": {"type": "string"}, "param": text, "code": text,
            },
            "required": ["message", "type", "param", "code"],
        }},
        "required": ["error"],
    })
}

pub(super) fn anthropic_error() -> Value {
    json!({
        "type": "object",
        "properties": {"type": {"const": "error"}, "error": {
            "type": "object",
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
            "required": ["type", "message"],
        }},
        "required": ["type", "error"],
    })
}
