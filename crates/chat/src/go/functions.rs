//! The functions of Go templates: those of `text/template` that chat templates use, and Ollama's own.

use std::borrow::Cow;
use std::cmp::Ordering;

use serde_json::{Map, Value};

use super::exec::{Run, Val, failed};
use crate::error::Result;

const KNOWN: [&str; 19] = [
    "and",
    "or",
    "not",
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "len",
    "index",
    "slice",
    "print",
    "println",
    "printf",
    "json",
    "currentDate",
    "yesterdayDate",
    "toTypeScriptType",
];

pub(super) fn is_known(name: &str) -> bool {
    KNOWN.contains(&name)
}

/// Calls a function. `and` and `or` are not here, since they look at arguments one by one.
pub(super) fn call<'d>(run: &mut Run, name: &str, values: &[Val<'d>]) -> Result<Val<'d>> {
    let missing = || failed(&format!("{name}: an argument is missing"));
    let first = || values.first().ok_or_else(missing);
    let result: Value = match name {
        "not" => (!truth(first()?)).into(),
        "eq" => {
            let first = first()?;
            let others = values.get(1..).filter(|v| !v.is_empty()).ok_or_else(missing)?;
            run.pay(size(first).saturating_mul(others.len()))?;
            others.iter().any(|value| equal(first, value)).into()
        }
        "ne" => {
            run.pay(size(first()?))?;
            (!equal(first()?, values.get(1).ok_or_else(missing)?)).into()
        }
        "lt" | "le" | "gt" | "ge" => {
            let order = compared(first()?, values.get(1).ok_or_else(missing)?)?;
            match name {
                "lt" => order.is_lt(),
                "le" => order.is_le(),
                "gt" => order.is_gt(),
                _ => order.is_ge(),
            }
            .into()
        }
        "len" => match &**first()? {
            Value::String(text) => text.len().into(),
            Value::Array(items) => items.len().into(),
            Value::Object(map) => map.len().into(),
            Value::Null => 0.into(),
            _ => return Err(failed("len: neither text nor list")),
        },
        "index" => return index(run, first()?.clone(), &values[1..]),
        "slice" => return slice(run, first()?, &values[1..]),
        "print" => values.iter().map(|v| printed(v)).collect::<String>().into(),
        "println" => {
            let words: Vec<Cow<'_, str>> = values.iter().map(|v| printed(v)).collect();
            (words.join(" ") + "\n").into()
        }
        "printf" => printf(run, &printed(first()?), &values[1..])?.into(),
        "json" => {
            let mut out = String::new();
            json(first()?, &mut out);
            out.into()
        }
        "currentDate" => run.now.date().into(),
        "yesterdayDate" => run.now.yesterday().date().into(),
        "toTypeScriptType" => typescript(first()?, 0).into(),
        name => return Err(failed(&format!("{name} takes arguments of its own"))),
    };
    run.pay(size(&result))?;
    Ok(Cow::Owned(result))
}

/// What Go takes for true: all but `false`, zero, and what is empty.
pub(super) fn truth(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(value) => *value,
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::String(text) => !text.is_empty(),
        Value::Array(items) => !items.is_empty(),
        Value::Object(map) => !map.is_empty(),
    }
}

/// As an action prints it: lists of plain values as Go does, Ollama's own types as JSON. What is missing
/// is printed as nothing, where Go has `<no value>`.
pub(super) fn printed(value: &Value) -> Cow<'_, str> {
    match value {
        Value::Null => "".into(),
        Value::String(text) => text.into(),
        Value::Array(items) if items.iter().all(|v| !v.is_object() && !v.is_array()) => {
            let words: Vec<Cow<'_, str>> = items.iter().map(printed).collect();
            format!("[{}]", words.join(" ")).into()
        }
        other => {
            let mut out = String::new();
            json(other, &mut out);
            out.into()
        }
    }
}

/// A field by Go's name, for which tools have keys in lower case.
pub(super) fn lookup<'v>(map: &'v Map<String, Value>, name: &str) -> Option<&'v Value> {
    map.get(name).or_else(|| {
        let first = name.chars().next().filter(char::is_ascii_uppercase)?;
        map.get(&format!("{}{}", first.to_ascii_lowercase(), &name[1..]))
    })
}

/// About what a value takes, in bytes.
pub(super) fn size(value: &Value) -> usize {
    match value {
        Value::String(text) => text.len(),
        Value::Array(items) => 32 + items.iter().map(|v| 32 + size(v)).sum::<usize>(),
        Value::Object(map) => 64 + map.iter().map(|(k, v)| 64 + k.len() + size(v)).sum::<usize>(),
        _ => 0,
    }
}

fn equal(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Number(a), Value::Number(b)) => a.as_f64() == b.as_f64(),
        // What is missing is as good as empty, as a field of a Go struct would be.
        (Value::Null, Value::String(text)) | (Value::String(text), Value::Null) => text.is_empty(),
        (a, b) => a == b,
    }
}

fn compared(a: &Value, b: &Value) -> Result<Ordering> {
    match (a, b) {
        (Value::Number(a), Value::Number(b)) => a.as_f64().partial_cmp(&b.as_f64()),
        (Value::String(a), Value::String(b)) => Some(a.cmp(b)),
        _ => None,
    }
    .ok_or_else(|| failed("what is compared is not of one kind"))
}

fn index<'d>(run: &mut Run, mut value: Val<'d>, path: &[Val<'d>]) -> Result<Val<'d>> {
    for key in path {
        value = match (&*value, &**key) {
            (Value::Array(items), Value::Number(_)) => {
                let at = position(key, items.len(), "index")?;
                if at == items.len() {
                    return Err(failed("index: out of range"));
                }
                run.item(&value, at)?
            }
            (Value::Object(_), Value::String(name)) => match &value {
                Cow::Borrowed(Value::Object(map)) => {
                    map.get(name).map_or(Cow::Owned(Value::Null), Cow::Borrowed)
                }
                _ => {
                    let found = value.get(name).cloned().unwrap_or_default();
                    run.pay(size(&found))?;
                    Cow::Owned(found)
                }
            },
            _ => return Err(failed("index: neither list nor map, or a key of another kind")),
        };
    }
    Ok(value)
}

fn slice<'d>(run: &mut Run, value: &Val<'d>, bounds: &[Val<'d>]) -> Result<Val<'d>> {
    let length = match &**value {
        Value::String(text) => text.len(),
        Value::Array(items) => items.len(),
        _ => return Err(failed("slice: neither text nor list")),
    };
    let bound = |i: usize, default: usize| match bounds.get(i) {
        Some(value) => position(value, length, "slice"),
        None => Ok(default),
    };
    let (from, to) = (bound(0, 0)?, bound(1, length)?);
    if from > to {
        return Err(failed("slice: out of range"));
    }
    let result = match &**value {
        // Go counts bytes; what would cut a letter gives nothing.
        Value::String(text) => text.get(from..to).unwrap_or_default().into(),
        Value::Array(items) => {
            run.pay(items[from..to].iter().map(size).sum())?;
            items[from..to].to_vec().into()
        }
        _ => Value::Null,
    };
    run.pay(size(&result))?;
    Ok(Cow::Owned(result))
}

/// A number of an item, up to the length.
fn position(value: &Value, length: usize, name: &str) -> Result<usize> {
    let at = value.as_u64().and_then(|at| usize::try_from(at).ok()).filter(|&at| at <= length);
    at.ok_or_else(|| failed(&format!("{name}: out of range")))
}

/// `%s`, `%v`, `%d`, `%q`, `%t`, `%f` and `%%`; flags and widths are passed over.
fn printf(run: &mut Run, format: &str, values: &[Val<'_>]) -> Result<String> {
    let mut out = String::new();
    let mut values = values.iter();
    let mut chars = format.chars().peekable();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        while chars.next_if(|c| matches!(c, '0'..='9' | '.' | '-' | '+' | '#' | ' ')).is_some() {}
        match chars.next() {
            Some('%') => out.push('%'),
            Some('q') => {
                let value = values.next().map(|v| printed(v)).unwrap_or_default();
                json_string(&value, false, &mut out);
            }
            Some(_) => {
                let value = values.next().map(|v| printed(v)).unwrap_or_default();
                run.pay(value.len())?;
                out += &value;
            }
            None => out.push('%'),
        }
    }
    Ok(out)
}

/// JSON as Go's `json.Marshal` writes it.
fn json(value: &Value, out: &mut String) {
    match value {
        Value::Array(items) => {
            out.push('[');
            for (i, item) in items.iter().enumerate() {
                out.push_str(if i > 0 { "," } else { "" });
                json(item, out);
            }
            out.push(']');
        }
        Value::Object(map) => {
            out.push('{');
            for (i, (key, item)) in map.iter().enumerate() {
                out.push_str(if i > 0 { "," } else { "" });
                json_string(key, true, out);
                out.push(':');
                json(item, out);
            }
            out.push('}');
        }
        Value::String(text) => json_string(text, true, out),
        Value::Number(number) => match number.as_f64().filter(|_| number.is_f64()) {
            // Go has no point where none is needed.
            Some(float) if float.fract() == 0.0 && float.abs() < 1e21 => {
                *out += &format!("{float:.0}")
            }
            _ => *out += &number.to_string(),
        },
        other => *out += &other.to_string(),
    }
}

/// A string in JSON; for `json.Marshal`, with what HTML would misread as escapes.
fn json_string(text: &str, html: bool, out: &mut String) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => *out += "\\\"",
            '\\' => *out += "\\\\",
            '\n' => *out += "\\n",
            '\r' => *out += "\\r",
            '\t' => *out += "\\t",
            '\u{8}' if html => *out += "\\b",
            '\u{c}' if html => *out += "\\f",
            '<' | '>' | '&' | '\u{2028}' | '\u{2029}' if html => {
                *out += &format!("\\u{:04x}", u32::from(c));
            }
            c if c < ' ' => *out += &format!("\\u{:04x}", u32::from(c)),
            c => out.push(c),
        }
    }
    out.push('"');
}

/// A property's type as TypeScript would have it.
fn typescript(property: &Value, depth: usize) -> String {
    if let Some(Value::Array(any)) = property.get("anyOf")
        && !any.is_empty()
        && depth < crate::limits::GO_DEPTH
    {
        return any.iter().map(|p| typescript(p, depth + 1)).collect::<Vec<_>>().join(" | ");
    }
    let one = |name: &Value| match name.as_str() {
        Some("string") => "string",
        Some("number" | "integer") => "number",
        Some("boolean") => "boolean",
        Some("array") => "any[]",
        Some("object") => "Record<string, any>",
        Some("null") => "null",
        _ => "any",
    };
    match property.get("type") {
        Some(Value::Array(names)) if !names.is_empty() => {
            names.iter().map(one).collect::<Vec<_>>().join(" | ")
        }
        Some(name) => one(name).into(),
        None => "any".into(),
    }
}
