//! Messages and tools as Ollama's templates see them: its structs' fields, in their order.

use serde_json::{Map, Value, json};

use crate::message::{Message, Tool};

/// A message, with the fields of Go's struct.
pub(super) fn message(message: &Message) -> Value {
    let calls = message.tool_calls.iter().enumerate().map(|(index, call)| {
        json!({
            "ID": call.id.clone().unwrap_or_default(),
            "Function": {
                "Index": index,
                "Name": call.name,
                "Arguments": sorted(&call.arguments),
            },
        })
    });
    json!({
        "Role": message.role,
        "Content": message.content,
        "Thinking": message.thinking.clone().unwrap_or_default(),
        "ToolCalls": calls.collect::<Value>(),
        "ToolName": message.tool_name.clone().unwrap_or_default(),
        "ToolCallID": message.tool_call_id.clone().unwrap_or_default(),
    })
}

/// A tool, whose JSON has lower-case keys. Templates call the same fields by their names in Go.
pub(super) fn tool(tool: &Tool) -> Value {
    let mut parameters =
        in_order(&tool.function.parameters, &["type", "$defs", "items", "required", "properties"]);
    if let Some(Value::Object(properties)) = parameters.get_mut("properties") {
        // A map, which Go sorts.
        let mut sorted: Vec<(String, Value)> = std::mem::take(properties).into_iter().collect();
        sorted.sort_by(|a, b| a.0.cmp(&b.0));
        let order = ["anyOf", "type", "items", "description", "enum", "properties"];
        properties.extend(sorted.into_iter().map(|(name, value)| {
            let value = in_order(&value, &order);
            (name, value)
        }));
    }
    json!({
        "type": tool.kind,
        "function": {
            "name": tool.function.name,
            "description": tool.function.description.clone().unwrap_or_default(),
            "parameters": parameters,
        },
    })
}

/// An object with these keys first, in this order.
fn in_order(value: &Value, keys: &[&str]) -> Value {
    let Value::Object(map) = value else {
        return value.clone();
    };
    let mut ordered = Map::new();
    for &key in keys {
        if let Some(value) = map.get(key) {
            ordered.insert(key.into(), value.clone());
        }
    }
    for (key, value) in map {
        if !ordered.contains_key(key) {
            ordered.insert(key.clone(), value.clone());
        }
    }
    Value::Object(ordered)
}

fn sorted(value: &Value) -> Value {
    match value {
        Value::Object(map) => {
            let mut entries: Vec<(&String, &Value)> = map.iter().collect();
            entries.sort_by_key(|entry| entry.0);
            entries.into_iter().map(|(key, value)| (key.clone(), value.clone())).collect()
        }
        Value::Null => Value::Object(Map::new()),
        other => other.clone(),
    }
}
