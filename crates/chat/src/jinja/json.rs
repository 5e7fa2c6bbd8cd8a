//! JSON as Python's `json.dumps` writes it, which is what models were trained on.

use minijinja::value::{Value, ValueKind};
use minijinja::{Error, ErrorKind, State};

use crate::limits;

/// The arguments of `json.dumps`.
#[derive(Debug)]
pub(super) struct Style {
    pub(super) ensure_ascii: bool,
    pub(super) sort_keys: bool,
    pub(super) indent: Option<String>,
    pub(super) item: String,
    pub(super) key: String,
}

impl Style {
    /// The JSON of a template's value.
    pub(super) fn write(&self, state: &State<'_, '_>, value: &Value) -> Result<String, Error> {
        let mut writer = Writer { style: self, out: String::new(), paid: 0, state };
        writer.value(value, 0)?;
        Ok(writer.out)
    }
}

/// A value as `json.dumps` writes it by default, but with letters of all languages as they are.
pub(super) fn python(value: &serde_json::Value) -> String {
    let mut out = String::new();
    match value {
        serde_json::Value::Object(map) => {
            out.push('{');
            for (i, (key, value)) in map.iter().enumerate() {
                out += if i > 0 { ", " } else { "" };
                string(key, false, &mut out);
                out += ": ";
                out += &python(value);
            }
            out.push('}');
        }
        serde_json::Value::Array(items) => {
            out.push('[');
            for (i, value) in items.iter().enumerate() {
                out += if i > 0 { ", " } else { "" };
                out += &python(value);
            }
            out.push(']');
        }
        serde_json::Value::String(text) => string(text, false, &mut out),
        serde_json::Value::Number(number) => match number.as_f64() {
            Some(float) if number.is_f64() => out += &python_float(float),
            _ => out += &number.to_string(),
        },
        other => out += &other.to_string(),
    }
    out
}

struct Writer<'a> {
    style: &'a Style,
    out: String,
    paid: usize,
    state: &'a State<'a, 'a>,
}

impl Writer<'_> {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > limits::JSON_DEPTH {
            return Err(Error::new(ErrorKind::InvalidOperation, "tojson: too deep"));
        }
        // As it grows, since a small template can name one value many times.
        self.state.consume_fuel(1 + ((self.out.len() - self.paid) / 64) as u64)?;
        self.paid = self.out.len();
        match value.kind() {
            ValueKind::None => self.out += "null",
            ValueKind::Bool => self.out += if value.is_true() { "true" } else { "false" },
            ValueKind::Number => self.out += &number(value),
            ValueKind::String => {
                string(value.as_str().unwrap_or_default(), self.style.ensure_ascii, &mut self.out);
            }
            ValueKind::Map => self.map(value, depth)?,
            ValueKind::Seq | ValueKind::Iterable => {
                let mut items = Vec::new();
                // Lists that were added up are no longer than they say when they are walked through.
                for item in value.try_iter()? {
                    self.state.consume_fuel(1)?;
                    items.push(item);
                }
                self.list('[', ']', depth, items.len(), |writer, i| {
                    writer.value(&items[i], depth + 1)
                })?;
            }
            kind => {
                let told = format!("tojson: {kind} is not JSON");
                return Err(Error::new(ErrorKind::InvalidOperation, told));
            }
        }
        Ok(())
    }

    fn map(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        let mut keys: Vec<Value> = value.try_iter()?.collect();
        if self.style.sort_keys {
            keys.sort();
        }
        self.list('{', '}', depth, keys.len(), |writer, i| {
            let key = match keys[i].kind() {
                ValueKind::None => "null".to_owned(),
                ValueKind::Bool => keys[i].is_true().to_string(),
                ValueKind::Number => number(&keys[i]),
                _ => keys[i].to_string(),
            };
            string(&key, writer.style.ensure_ascii, &mut writer.out);
            writer.out += &writer.style.key;
            writer.value(&value.get_item(&keys[i])?, depth + 1)
        })
    }

    fn list(
        &mut self,
        open: char,
        close: char,
        depth: usize,
        count: usize,
        mut write: impl FnMut(&mut Self, usize) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.out.push(open);
        for i in 0..count {
            if i > 0 {
                self.out += &self.style.item;
            }
            self.line(depth + 1);
            write(self, i)?;
        }
        if count > 0 {
            self.line(depth);
        }
        self.out.push(close);
        Ok(())
    }

    fn line(&mut self, depth: usize) {
        if let Some(indent) = &self.style.indent {
            self.out.push('\n');
            self.out += &indent.repeat(depth);
        }
    }
}

fn number(value: &Value) -> String {
    match f64::try_from(value.clone()) {
        Ok(float) if !value.is_integer() => python_float(float),
        _ => value.to_string(),
    }
}

fn string(text: &str, ensure_ascii: bool, out: &mut String) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => *out += "\\\"",
            '\\' => *out += "\\\\",
            '\n' => *out += "\\n",
            '\r' => *out += "\\r",
            '\t' => *out += "\\t",
            '\u{8}' => *out += "\\b",
            '\u{c}' => *out += "\\f",
            c if c < ' ' || (ensure_ascii && c > '~') => {
                let mut units = [0; 2];
                for unit in c.encode_utf16(&mut units) {
                    *out += &format!("\\u{unit:04x}");
                }
            }
            c => out.push(c),
        }
    }
    out.push('"');
}

/// A float as Python's `repr` has it, for which the exponent has a sign and two digits.
pub(super) fn python_float(float: f64) -> String {
    if float.is_nan() {
        return "NaN".into();
    }
    if float.is_infinite() {
        return if float > 0.0 { "Infinity" } else { "-Infinity" }.into();
    }
    // Its digits are the shortest ones, and of two that are as near the even ones, as in Python; those of
    // `{:?}` are not.
    let text = serde_json::Number::from_f64(float).map_or_else(String::new, |n| n.to_string());
    let (mantissa, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    let (sign, mantissa) = mantissa.strip_prefix('-').map_or(("", mantissa), |rest| ("-", rest));
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let all = format!("{whole}{fraction}");
    let digits = all.trim_start_matches('0').trim_end_matches('0');
    if digits.is_empty() {
        return format!("{sign}0.0");
    }
    let zeros = all.len() - all.trim_start_matches('0').len();
    // Where the point is, in digits from the first one that is not 0.
    let point = exponent.parse::<i64>().unwrap_or(0) + (whole.len() as i64) - (zeros as i64);
    let count = digits.len() as i64;
    match point {
        1..=16 if point >= count => format!("{sign}{digits:0<width$}.0", width = point as usize),
        1..=16 => format!("{sign}{}.{}", &digits[..point as usize], &digits[point as usize..]),
        -3..=0 => format!("{sign}0.{}{digits}", "0".repeat(-point as usize)),
        _ => {
            let exponent = point - 1;
            let (first, rest) = digits.split_at(1);
            let point = if rest.is_empty() { "" } else { "." };
            let mark = if exponent < 0 { '-' } else { '+' };
            format!("{sign}{first}{point}{rest}e{mark}{:02}", exponent.abs())
        }
    }
}
