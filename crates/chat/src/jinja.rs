//! Jinja templates, with what Hugging Face's transformers gives them (its `chat_template_utils.py`).

mod habits;
mod json;
mod python;
mod tags;

use std::borrow::Cow;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value, ValueKind};
use minijinja::{Environment, ErrorKind, State};
use serde_json::json;

use crate::error::{Error, Result};
use crate::limits;
use crate::message::Message;
use crate::template::{Request, request_bytes};
use crate::time::DateTime;
use habits::{Arguments, Habits};

/// A template that was read, and what it wants messages to be like.
#[derive(Debug)]
pub(crate) struct JinjaTemplate {
    source: String,
    bos: String,
    eos: String,
    habits: Habits,
}

impl JinjaTemplate {
    pub(crate) fn new(source: &str, bos: &str, eos: &str) -> Result<Self> {
        let mut template = Self {
            source: tags::prepared(source)?,
            bos: bos.into(),
            eos: eos.into(),
            habits: Habits::default(),
        };
        environment(DateTime::from_unix(0), limits::FUEL)
            .template_from_str(&template.source)
            .map_err(|error| Error::Syntax {
                line: error.line().unwrap_or(0),
                reason: told(&error),
            })?;
        template.habits = Habits::of(&template);
        Ok(template)
    }

    pub(crate) fn habits(&self) -> &Habits {
        &self.habits
    }

    /// Whether it looks at what [`Think`] sets, or at what was thought before.
    pub(crate) fn knows_thinking(&self) -> bool {
        ["enable_thinking", "reasoning_effort", "reasoning_content", ".thinking"]
            .iter()
            .any(|name| self.source.contains(name))
    }

    pub(crate) fn render(&self, request: &Request<'_>) -> Result<String> {
        self.render_as(&self.habits, request)
    }

    /// Renders with messages in the shape that `habits` say.
    fn render_as(&self, habits: &Habits, request: &Request<'_>) -> Result<String> {
        let messages = self.adapted(habits, request.messages);
        let mut context = json!({
            "messages": messages.iter().map(|m| self.message(habits, m)).collect::<Vec<_>>(),
            "tools": (!request.tools.is_empty()).then_some(request.tools),
            "documents": null,
            "add_generation_prompt": request.add_generation_prompt,
            "bos_token": self.bos,
            "eos_token": self.eos,
        });
        if let Some(think) = request.think {
            context["enable_thinking"] = think.is_on().into();
            context["thinking"] = think.is_on().into();
            if let Some(level) = think.level() {
                context["reasoning_effort"] = level.into();
            }
        }
        let fuel = limits::fuel(request.messages.len(), request_bytes(request));
        environment(request.now, fuel)
            .template_from_str(&self.source)
            .and_then(|template| template.render(Value::from(Serde(&context))))
            .map_err(|error| match error.kind() {
                ErrorKind::OutOfFuel => Error::OutOfFuel,
                _ => Error::Render(told(&error)),
            })
    }

    /// The messages with roles that the template knows.
    fn adapted<'m>(&self, habits: &Habits, messages: &'m [Message]) -> Cow<'m, [Message]> {
        let knows_developer = self.source.contains("developer");
        let stays = |m: &Message| {
            (m.role != "developer" || knows_developer) && (m.role != "system" || habits.system)
        };
        if messages.iter().all(stays) {
            return Cow::Borrowed(messages);
        }
        let mut adapted: Vec<Message> = Vec::with_capacity(messages.len());
        let mut system = String::new();
        for message in messages {
            let mut message = message.clone();
            if message.role == "developer" && !knows_developer {
                message.role = "system".into();
            }
            if message.role == "system" && !habits.system {
                system += &message.content;
                system += "\n\n";
            } else {
                if message.role == "user" && !system.is_empty() {
                    message.content.insert_str(0, &system);
                    system.clear();
                }
                adapted.push(message);
            }
        }
        if !system.is_empty() {
            adapted.push(Message::new("user", system.trim_end()));
        }
        Cow::Owned(adapted)
    }

    fn message(&self, habits: &Habits, message: &Message) -> serde_json::Value {
        let calls = !message.tool_calls.is_empty();
        // gpt-oss's template refuses text beside thinking in a message that calls.
        let drops = calls && message.thinking.is_some() && self.source.contains("<|channel|>");
        let text = if drops { "" } else { message.content.as_str() };
        let content = if calls && text.is_empty() && habits.null_content {
            serde_json::Value::Null
        } else if habits.typed_content {
            json!([{"type": "text", "text": text}])
        } else {
            text.into()
        };
        let mut object = json!({"role": message.role, "content": content});
        if let Some(thinking) = &message.thinking {
            object["reasoning_content"] = thinking.as_str().into();
            object["thinking"] = thinking.as_str().into();
        }
        if calls {
            let calls = message.tool_calls.iter().map(|call| {
                let arguments = match habits.arguments {
                    Arguments::Object => call.arguments.clone(),
                    Arguments::Text => json::python(&call.arguments).into(),
                };
                let function = json!({"name": call.name, "arguments": arguments});
                match &call.id {
                    Some(id) => json!({"type": "function", "id": id, "function": function}),
                    None => json!({"type": "function", "function": function}),
                }
            });
            object["tool_calls"] = calls.collect();
        }
        if let Some(id) = &message.tool_call_id {
            object["tool_call_id"] = id.as_str().into();
        }
        if let Some(name) = &message.tool_name {
            object["name"] = name.as_str().into();
        }
        object
    }
}

/// What went wrong, without the template's own text.
fn told(error: &minijinja::Error) -> String {
    match error.detail() {
        Some(detail) => detail.into(),
        None => error.kind().to_string(),
    }
}

fn environment(now: DateTime, fuel: u64) -> Environment<'static> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.unwrap_or_default());
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    python::add_to(&mut environment);
    environment.set_fuel(Some(fuel));
    environment.set_recursion_limit(limits::JINJA_DEPTH);
    environment.add_filter("tojson", tojson);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", move |format: &str| now.strftime(format));
    environment
}

fn raise_exception(message: &str) -> std::result::Result<Value, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, message.to_owned()))
}

fn tojson(
    state: &State<'_, '_>,
    value: &Value,
    ensure_ascii: Option<bool>,
    kwargs: Kwargs,
) -> std::result::Result<String, minijinja::Error> {
    let indent: Option<Value> = kwargs.get("indent")?;
    let separators: Option<Value> = kwargs.get("separators")?;
    let sort_keys: Option<bool> = kwargs.get("sort_keys")?;
    let named: Option<bool> = kwargs.get("ensure_ascii")?;
    kwargs.assert_all_used()?;
    let indent = match indent {
        Some(indent) if indent.kind() == ValueKind::String => indent.as_str().map(str::to_owned),
        Some(indent) if !indent.is_none() => {
            let width = usize::try_from(indent)?.min(16);
            Some(" ".repeat(width))
        }
        _ => None,
    };
    let item = if indent.is_some() { "," } else { ", " };
    let (item, key) = match separators {
        Some(pair) if !pair.is_none() => {
            (pair.get_item_by_index(0)?.to_string(), pair.get_item_by_index(1)?.to_string())
        }
        _ => (item.into(), ": ".into()),
    };
    let style = json::Style {
        ensure_ascii: named.or(ensure_ascii).unwrap_or(false),
        sort_keys: sort_keys.unwrap_or(false),
        indent,
        item,
        key,
    };
    style.write(state, value)
}
