//! The document as a page without scripts.

use std::fmt::Write;

use serde_json::Value;

const HEAD: &str = "<!doctype html><html lang=en><meta charset=utf-8>\
<meta name=viewport content='width=device-width,initial-scale=1'><title>tierstream: routes</title><style>\
:root{color-scheme:light dark}\
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}\
code{font:.9em ui-monospace,monospace}\
summary{cursor:pointer;padding:.3rem 0}\
summary b{display:inline-block;min-width:4.5em;text-transform:uppercase;font-size:.8em}\
table{border-collapse:collapse;margin:.5rem 0 1rem;width:100%}\
td,th{text-align:left;vertical-align:top;padding:.2rem .6rem .2rem 0;border-bottom:1px solid #8884}\
</style>";

/// All routes, by dialect, each with the fields of its request.
pub(super) fn page(document: &Value) -> String {
    let mut page = HEAD.to_owned();
    let info = &document["info"];
    put(
        &mut page,
        format_args!(
            "<h1>tierstream {}</h1><p>{} As a document: <a href=openapi.json>openapi.json</a>.",
            escaped(&info["version"]),
            escaped(&info["description"])
        ),
    );
    for tag in ["Ollama", "OpenAI", "Anthropic", "Server"] {
        put(&mut page, format_args!("<h2>{tag}</h2>"));
        for (path, methods) in document["paths"].as_object().into_iter().flatten() {
            for (method, operation) in methods.as_object().into_iter().flatten() {
                if operation["tags"][0] == tag {
                    route(&mut page, document, method, path, operation);
                }
            }
        }
    }
    page
}

fn route(page: &mut String, document: &Value, method: &str, path: &str, operation: &Value) {
    let (path, about) = (text(path), escaped(&operation["summary"]));
    put(
        page,
        format_args!("<details><summary><b>{method}</b> <code>{path}</code> {about}</summary>"),
    );
    let schema = &operation["requestBody"]["content"]["application/json"]["schema"];
    let mut rows = String::new();
    for parameter in operation["parameters"].as_array().into_iter().flatten() {
        let place = escaped(&parameter["in"]);
        put(
            &mut rows,
            format_args!("<tr><td><code>{}</code><td>{place}<td>", escaped(&parameter["name"])),
        );
    }
    fields(&mut rows, document, schema);
    if !rows.is_empty() {
        put(page, format_args!("<table><tr><th>Field<th>Type<th>{rows}</table>"));
    }
    let answers = operation["responses"]["200"]["content"].as_object();
    let kinds: Vec<String> = answers
        .into_iter()
        .flatten()
        .map(|(kind, _)| format!("<code>{}</code>", text(kind)))
        .collect();
    if !kinds.is_empty() {
        put(page, format_args!("<p>Answers: {}", kinds.join(", ")));
    }
    put(page, format_args!("</details>"));
}

fn fields(rows: &mut String, document: &Value, schema: &Value) {
    let schema = resolved(document, schema);
    let required = |name: &str| {
        schema["required"].as_array().is_some_and(|all| all.iter().any(|one| one == name))
    };
    for (name, field) in schema["properties"].as_object().into_iter().flatten() {
        let must = if required(name) { ", required" } else { "" };
        let (name, kind) = (text(name), text(&kind(field)));
        let about = field["description"].as_str().map(text).unwrap_or_default();
        put(rows, format_args!("<tr><td><code>{name}</code><td>{kind}{must}<td>{about}"));
    }
}

/// The type of a field, in a few words.
fn kind(field: &Value) -> String {
    if let Some(name) = field["$ref"].as_str() {
        return name.rsplit('/').next().unwrap_or_default().to_owned();
    }
    for key in ["anyOf", "oneOf", "enum"] {
        if let Some(all) = field[key].as_array() {
            let one = |value: &Value| if key == "enum" { value.to_string() } else { kind(value) };
            return all.iter().map(one).collect::<Vec<_>>().join(" | ");
        }
    }
    match &field["type"] {
        Value::String(name) if name == "array" => format!("list of {}", kind(&field["items"])),
        Value::String(name) => name.clone(),
        Value::Array(names) => {
            let of = |name: &Value| match name.as_str() {
                Some("array") => format!("list of {}", kind(&field["items"])),
                name => name.unwrap_or_default().to_owned(),
            };
            names.iter().map(of).collect::<Vec<_>>().join(" | ")
        }
        _ => "any".into(),
    }
}

fn resolved<'a>(document: &'a Value, schema: &'a Value) -> &'a Value {
    let named = schema["$ref"].as_str().and_then(|name| document.pointer(name.strip_prefix('#')?));
    named.unwrap_or(schema)
}

fn escaped(value: &Value) -> String {
    text(value.as_str().unwrap_or_default())
}

fn text(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('"', "&quot;")
}

fn put(page: &mut String, what: std::fmt::Arguments<'_>) {
    page.write_fmt(what).expect("a string takes all that is written");
}
