//! What templates may expect of Python, and minijinja has otherwise or not at all.
//!
//! Still missing, and refused with an error: `%` between strings, `+` before a number, `varargs` and `kwargs`
//! of macros. A macro does not see a variable from outside of which it only takes slices. Floats in lists, dicts and beside `~` are printed without an exponent.

use minijinja::value::{Kwargs, Rest, Tuple, Value, ValueKind, from_args};
use minijinja::{Environment, Error, ErrorKind, Output, State, filters};

use super::json::python_float;

/// Adds all of it.
pub(super) fn add_to(environment: &mut Environment<'_>) {
    environment.set_unknown_method_callback(method);
    environment.set_formatter(print);
    environment.add_filter("string", string);
    environment.add_filter("indent", indent);
    environment.add_filter("int", int);
    environment.add_filter("float", float);
    environment.add_filter("default", default);
    environment.add_filter("d", default);
    environment.add_filter("escape", escape);
    environment.add_filter("e", escape);
    environment.add_filter("truncate", minijinja_contrib::filters::truncate);
    environment.add_filter("striptags", minijinja_contrib::filters::striptags);
    environment.add_function("cycler", |items: Rest<Value>| {
        minijinja_contrib::globals::cycler(items.to_vec())
    });
    environment.add_function("joiner", minijinja_contrib::globals::joiner);
    environment.add_test("sequence", is_sequence);
}

fn method(
    state: &mut State<'_, '_>,
    value: &Value,
    name: &str,
    arguments: &[Value],
) -> Result<Value, Error> {
    if let Some(text) = value.as_str()
        && let Some(result) = text_method(state, text, name, arguments)
    {
        return result;
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, name, arguments)
}

/// A method of `str`; nothing if it is not one of those here.
fn text_method(
    state: &State<'_, '_>,
    text: &str,
    name: &str,
    arguments: &[Value],
) -> Option<Result<Value, Error>> {
    Some(match name {
        "title" => from_args(arguments).map(|()| title(text).into()),
        "casefold" => from_args(arguments).map(|()| text.to_lowercase().replace('ß', "ss").into()),
        "swapcase" => from_args(arguments).map(|()| swapped(text).into()),
        "removeprefix" => from_args(arguments)
            .map(|(prefix,): (&str,)| text.strip_prefix(prefix).unwrap_or(text).into()),
        "removesuffix" => from_args(arguments)
            .map(|(suffix,): (&str,)| text.strip_suffix(suffix).unwrap_or(text).into()),
        "partition" => from_args(arguments).and_then(|(mark,): (&str,)| {
            check_mark(mark)?;
            let (before, mark, after) =
                text.split_once(mark).map_or((text, "", ""), |(a, b)| (a, mark, b));
            Ok(tuple([before, mark, after]))
        }),
        "rpartition" => from_args(arguments).and_then(|(mark,): (&str,)| {
            check_mark(mark)?;
            let (before, mark, after) =
                text.rsplit_once(mark).map_or(("", "", text), |(a, b)| (a, mark, b));
            Ok(tuple([before, mark, after]))
        }),
        "rsplit" => {
            let (mark, most) = match from_args::<(Option<&str>, Option<i64>)>(arguments) {
                Ok(given) => given,
                Err(error) => return Some(Err(error)),
            };
            rsplit(text, mark, most)
        }
        "index" | "rindex" => from_args(arguments).and_then(|(part,): (&str,)| {
            let found = if name == "index" { text.find(part) } else { text.rfind(part) };
            let missing = || failed("substring not found");
            found.map(|at| text[..at].chars().count().into()).ok_or_else(missing)
        }),
        "ljust" | "rjust" | "center" | "zfill" => padded(state, text, name, arguments),
        _ => return None,
    })
}

/// Every letter that follows none is a capital.
fn title(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut follows = false;
    for c in text.chars() {
        if follows {
            out.extend(c.to_lowercase())
        } else {
            out.extend(c.to_uppercase())
        }
        follows = c.is_alphabetic();
    }
    out
}

fn swapped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_uppercase() { out.extend(c.to_lowercase()) } else { out.extend(c.to_uppercase()) }
    }
    out
}

fn check_mark(mark: &str) -> Result<(), Error> {
    if mark.is_empty() { Err(failed("empty separator")) } else { Ok(()) }
}

fn tuple(parts: [&str; 3]) -> Value {
    Value::from_object(Tuple::from(parts.map(Value::from).to_vec()))
}

fn rsplit(text: &str, mark: Option<&str>, most: Option<i64>) -> Result<Value, Error> {
    let most = most.and_then(|most| usize::try_from(most).ok()).unwrap_or(usize::MAX);
    let mut parts: Vec<&str> = Vec::new();
    let mut rest = text;
    match mark {
        Some(mark) => {
            check_mark(mark)?;
            while parts.len() < most
                && let Some((before, part)) = rest.rsplit_once(mark)
            {
                parts.push(part);
                rest = before;
            }
            parts.push(rest);
        }
        None => {
            rest = rest.trim_end();
            while parts.len() < most
                && let Some((before, part)) = rest.rsplit_once(char::is_whitespace)
            {
                parts.push(part);
                rest = before.trim_end();
            }
            parts.extend(Some(rest.trim_start()).filter(|rest| !rest.is_empty()));
            parts.retain(|part| !part.is_empty());
        }
    }
    parts.reverse();
    Ok(parts.into_iter().map(Value::from).collect())
}

/// Filled up to a width.
fn padded(
    state: &State<'_, '_>,
    text: &str,
    name: &str,
    arguments: &[Value],
) -> Result<Value, Error> {
    let (width, fill): (usize, Option<char>) = from_args(arguments)?;
    let missing = width.saturating_sub(text.chars().count());
    state.consume_fuel((missing / 64) as u64)?;
    let fill = fill.unwrap_or(if name == "zfill" { '0' } else { ' ' });
    let some = |count: usize| fill.to_string().repeat(count);
    Ok(match name {
        "ljust" => format!("{text}{}", some(missing)),
        "center" => {
            let left = missing / 2 + (missing & width & 1);
            format!("{}{text}{}", some(left), some(missing - left))
        }
        "zfill" if text.starts_with(['+', '-']) => {
            format!("{}{}{}", &text[..1], some(missing), &text[1..])
        }
        _ => format!("{}{text}", some(missing)),
    }
    .into())
}

fn failed(reason: &'static str) -> Error {
    Error::new(ErrorKind::InvalidOperation, reason)
}

/// The float that a value is.
fn as_float(value: &Value) -> Option<f64> {
    let is_float = value.kind() == ValueKind::Number && !value.is_integer();
    is_float.then(|| f64::try_from(value.clone()).ok()).flatten()
}

fn print(out: &mut Output<'_>, state: &mut State<'_, '_>, value: &Value) -> Result<(), Error> {
    match as_float(value) {
        Some(float) => Ok(out.write_str(&python_str(float))?),
        None => minijinja::escape_formatter(out, state, value),
    }
}

/// As `str` has it, which JSON calls otherwise.
fn python_str(float: f64) -> String {
    let text = python_float(float);
    match text.as_str() {
        "NaN" => "nan".into(),
        "Infinity" => "inf".into(),
        "-Infinity" => "-inf".into(),
        _ => text,
    }
}

fn string(state: &State<'_, '_>, value: &Value) -> Result<Value, Error> {
    match as_float(value) {
        Some(float) => Ok(python_str(float).into()),
        None => filters::string(state, value),
    }
}

/// All lines but the first one, and empty ones, further in.
fn indent(
    text: &str,
    width: Option<Value>,
    first: Option<bool>,
    blank: Option<bool>,
    kwargs: Kwargs,
) -> Result<String, Error> {
    let width = width.or(kwargs.get("width")?).unwrap_or_else(|| 4.into());
    let first = first.or(kwargs.get("first")?).unwrap_or(false);
    let blank = blank.or(kwargs.get("blank")?).unwrap_or(false);
    kwargs.assert_all_used()?;
    let space = match width.as_str() {
        Some(text) => text.to_owned(),
        None => " ".repeat(usize::try_from(width)?.min(64)),
    };
    let mut out = String::new();
    for (i, line) in text.split('\n').enumerate() {
        out += if i > 0 { "\n" } else { "" };
        if if i == 0 { first } else { blank || !line.is_empty() } {
            out += &space;
        }
        out += line;
    }
    Ok(out)
}

/// What is no number becomes 0, or what the template says.
fn int(
    state: &State<'_, '_>,
    value: &Value,
    default: Option<Value>,
    base: Option<u32>,
    kwargs: Kwargs,
) -> Result<Value, Error> {
    let named: Option<Value> = kwargs.peek("default")?;
    let fallback = default.clone().or(named).unwrap_or_else(|| 0.into());
    Ok(filters::int(state, value, default, base, kwargs).unwrap_or(fallback))
}

fn float(
    state: &State<'_, '_>,
    value: &Value,
    default: Option<Value>,
    kwargs: Kwargs,
) -> Result<Value, Error> {
    let named: Option<Value> = kwargs.peek("default")?;
    let fallback = default.clone().or(named).unwrap_or_else(|| 0.0.into());
    Ok(filters::float(state, value, default, kwargs).unwrap_or(fallback))
}

fn default(
    value: &Value,
    other: Option<Value>,
    boolean: Option<Value>,
    kwargs: Kwargs,
) -> Result<Value, Error> {
    let other = other.or(kwargs.get("default_value")?).unwrap_or_else(|| "".into());
    let boolean = boolean.or(kwargs.get("boolean")?).is_some_and(|value| value.is_true());
    kwargs.assert_all_used()?;
    Ok(if value.is_undefined() || (boolean && !value.is_true()) { other } else { value.clone() })
}

fn escape(value: &Value) -> Value {
    if value.is_safe() {
        return value.clone();
    }
    let text = value.to_string();
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out += "&amp;",
            '<' => out += "&lt;",
            '>' => out += "&gt;",
            '"' => out += "&#34;",
            '\'' => out += "&#39;",
            c => out.push(c),
        }
    }
    Value::from_safe_string(out)
}

fn is_sequence(value: &Value) -> bool {
    let kinds = [ValueKind::Seq, ValueKind::Map, ValueKind::String, ValueKind::Undefined];
    kinds.contains(&value.kind())
}
