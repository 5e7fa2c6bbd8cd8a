//! Running a Go template's tree.

use std::borrow::Cow;

use serde_json::Value;

use super::functions;
use super::parse::{Base, Command, Node, Operand, Pipe};
use crate::error::{Error, Result};
use crate::time::DateTime;

/// A value: part of the data, or one that the template made.
pub(super) type Val<'d> = Cow<'d, Value>;

/// What a run has written so far, and may still take.
#[derive(Debug)]
pub(super) struct Run {
    pub(super) now: DateTime,
    fuel: u64,
    output: String,
}

/// Whether to go on after a node.
#[derive(PartialEq)]
enum Flow {
    On,
    Break,
    Continue,
}

impl Run {
    pub(super) fn new(now: DateTime, fuel: u64) -> Self {
        Self { now, fuel, output: String::new() }
    }

    /// Writes a template once, with these data.
    pub(super) fn template(&mut self, nodes: &[Node], data: &Value) -> Result<()> {
        let dot = Cow::Borrowed(data);
        let mut scope = Scope { root: data, variables: Vec::new() };
        self.nodes(nodes, &dot, &mut scope)?;
        Ok(())
    }

    pub(super) fn into_output(self) -> String {
        self.output
    }

    /// Pays for a step that makes so many bytes.
    pub(super) fn pay(&mut self, bytes: usize) -> Result<()> {
        let price = 1 + (bytes / 64) as u64;
        self.fuel = self.fuel.checked_sub(price).ok_or(Error::OutOfFuel)?;
        Ok(())
    }

    fn nodes<'d>(&mut self, nodes: &[Node], dot: &Val<'d>, scope: &mut Scope<'d>) -> Result<Flow> {
        let outer = scope.variables.len();
        for node in nodes {
            let flow = self.node(node, dot, scope)?;
            if flow != Flow::On {
                scope.variables.truncate(outer);
                return Ok(flow);
            }
        }
        scope.variables.truncate(outer);
        Ok(Flow::On)
    }

    fn node<'d>(&mut self, node: &Node, dot: &Val<'d>, scope: &mut Scope<'d>) -> Result<Flow> {
        self.pay(0)?;
        match node {
            Node::Text(text) => {
                self.pay(text.len())?;
                self.output += text;
            }
            Node::Action(pipe) => {
                let value = self.pipe(pipe, dot, scope)?;
                if pipe.variables.is_empty() {
                    let text = functions::printed(&value);
                    self.pay(text.len())?;
                    self.output += &text;
                }
            }
            Node::If { pipe, is_with, then, otherwise } => {
                let outer = scope.variables.len();
                let value = self.pipe(pipe, dot, scope)?;
                let flow = match (functions::truth(&value), is_with) {
                    (true, true) => self.nodes(then, &value, scope)?,
                    (true, false) => self.nodes(then, dot, scope)?,
                    (false, _) => self.nodes(otherwise, dot, scope)?,
                };
                scope.variables.truncate(outer);
                return Ok(flow);
            }
            Node::Range { pipe, body, otherwise } => {
                let outer = scope.variables.len();
                let flow = self.range(pipe, body, otherwise, dot, scope);
                scope.variables.truncate(outer);
                return flow;
            }
            Node::Break => return Ok(Flow::Break),
            Node::Continue => return Ok(Flow::Continue),
        }
        Ok(Flow::On)
    }

    fn range<'d>(
        &mut self,
        pipe: &Pipe,
        body: &[Node],
        otherwise: &[Node],
        dot: &Val<'d>,
        scope: &mut Scope<'d>,
    ) -> Result<Flow> {
        let value = self.commands(pipe, dot, scope)?;
        let count = match &*value {
            Value::Array(items) => items.len(),
            Value::Object(map) => map.len(),
            Value::Number(number) => usize::try_from(number.as_i64().unwrap_or(0)).unwrap_or(0),
            Value::Null => 0,
            _ => return Err(failed("range over what is no list")),
        };
        self.pay(value.as_object().map_or(0, |map| map.len().saturating_mul(64)))?;
        // Go sorts the keys of maps.
        let mut keys: Vec<String> =
            value.as_object().into_iter().flat_map(|m| m.keys().cloned()).collect();
        keys.sort();
        if count == 0 {
            return self.nodes(otherwise, dot, scope);
        }
        let outer = scope.variables.len();
        for i in 0..count {
            self.pay(0)?;
            let (key, item): (Value, Val<'d>) = match &value {
                _ if value.is_number() => (i.into(), Cow::Owned(i.into())),
                value => match keys.get(i) {
                    Some(key) => (key.as_str().into(), self.member(value, key)?),
                    None => (i.into(), self.item(value, i)?),
                },
            };
            match pipe.variables.as_slice() {
                [one] => scope.set(one, item.clone(), pipe.declares)?,
                [first, second, ..] => {
                    scope.set(first, Cow::Owned(key), pipe.declares)?;
                    scope.set(second, item.clone(), pipe.declares)?;
                }
                [] => {}
            }
            let flow = self.nodes(body, &item, scope)?;
            scope.variables.truncate(outer);
            if flow == Flow::Break {
                break;
            }
        }
        Ok(Flow::On)
    }

    fn pipe<'d>(&mut self, pipe: &Pipe, dot: &Val<'d>, scope: &mut Scope<'d>) -> Result<Val<'d>> {
        let value = self.commands(pipe, dot, scope)?;
        for name in &pipe.variables {
            if let Cow::Owned(value) = &value {
                self.pay(functions::size(value))?;
            }
            scope.set(name, value.clone(), pipe.declares)?;
        }
        Ok(value)
    }

    fn commands<'d>(
        &mut self,
        pipe: &Pipe,
        dot: &Val<'d>,
        scope: &mut Scope<'d>,
    ) -> Result<Val<'d>> {
        let mut value = None;
        for command in &pipe.commands {
            value = Some(self.command(command, value, dot, scope)?);
        }
        Ok(value.unwrap_or(Cow::Owned(Value::Null)))
    }

    /// A command, with what came through the pipe as its last argument.
    fn command<'d>(
        &mut self,
        command: &Command,
        piped: Option<Val<'d>>,
        dot: &Val<'d>,
        scope: &mut Scope<'d>,
    ) -> Result<Val<'d>> {
        self.pay(0)?;
        let Some((first, arguments)) = command.arguments.split_first() else {
            return Err(failed("a command is missing"));
        };
        let Base::Function(name) = &first.base else {
            return match piped {
                Some(_) => Err(failed("a pipe ends in what is no function")),
                None => self.operand(first, dot, scope),
            };
        };
        let value = if name == "and" || name == "or" {
            self.logic(name == "or", arguments, piped, dot, scope)?
        } else {
            let mut values = Vec::with_capacity(arguments.len() + 1);
            for argument in arguments {
                values.push(self.operand(argument, dot, scope)?);
            }
            values.extend(piped);
            functions::call(self, name, &values)?
        };
        self.fields(value, &first.fields)
    }

    /// `and` and `or` give the first argument that settles it, and look at no more.
    fn logic<'d>(
        &mut self,
        until: bool,
        arguments: &[Operand],
        piped: Option<Val<'d>>,
        dot: &Val<'d>,
        scope: &mut Scope<'d>,
    ) -> Result<Val<'d>> {
        let mut last = None;
        for argument in arguments {
            let value = self.operand(argument, dot, scope)?;
            if functions::truth(&value) == until {
                return Ok(value);
            }
            last = Some(value);
        }
        piped.or(last).ok_or_else(|| failed("and, or: an argument is missing"))
    }

    fn operand<'d>(
        &mut self,
        operand: &Operand,
        dot: &Val<'d>,
        scope: &mut Scope<'d>,
    ) -> Result<Val<'d>> {
        let base = match &operand.base {
            Base::Dot => self.copy(dot)?,
            Base::Variable(name) => {
                let value = scope.get(name)?;
                self.copy(&value)?
            }
            Base::Literal(value) => Cow::Owned(value.clone()),
            Base::Function(name) => functions::call(self, name, &[])?,
            Base::Pipe(pipe) => self.pipe(pipe, dot, scope)?,
        };
        self.fields(base, &operand.fields)
    }

    fn fields<'d>(&mut self, mut value: Val<'d>, fields: &[String]) -> Result<Val<'d>> {
        for name in fields {
            self.pay(0)?;
            value = self.member(&value, name)?;
        }
        Ok(value)
    }

    /// A field of a struct or a key of a map; nothing if there is none.
    fn member<'d>(&mut self, value: &Val<'d>, name: &str) -> Result<Val<'d>> {
        match value {
            Cow::Borrowed(Value::Object(map)) => {
                Ok(functions::lookup(map, name).map_or(Cow::Owned(Value::Null), Cow::Borrowed))
            }
            Cow::Owned(Value::Object(map)) => {
                let found = functions::lookup(map, name).cloned().unwrap_or_default();
                self.pay(functions::size(&found))?;
                Ok(Cow::Owned(found))
            }
            value if value.is_null() => Ok(Cow::Owned(Value::Null)),
            _ => Err(failed(&format!("there is no field {name} in what is no object"))),
        }
    }

    /// An item of a list; nothing if there is none.
    pub(super) fn item<'d>(&mut self, value: &Val<'d>, at: usize) -> Result<Val<'d>> {
        Ok(match value {
            Cow::Borrowed(Value::Array(items)) => {
                items.get(at).map_or(Cow::Owned(Value::Null), Cow::Borrowed)
            }
            Cow::Owned(Value::Array(items)) => {
                let found = items.get(at).cloned().unwrap_or_default();
                self.pay(functions::size(&found))?;
                Cow::Owned(found)
            }
            _ => Cow::Owned(Value::Null),
        })
    }

    fn copy<'d>(&mut self, value: &Val<'d>) -> Result<Val<'d>> {
        if let Cow::Owned(value) = value {
            self.pay(functions::size(value))?;
        }
        Ok(value.clone())
    }
}

/// The variables that can be seen, inner ones last.
struct Scope<'d> {
    root: &'d Value,
    variables: Vec<(String, Val<'d>)>,
}

impl<'d> Scope<'d> {
    fn get(&self, name: &str) -> Result<Val<'d>> {
        if name == "$" {
            return Ok(Cow::Borrowed(self.root));
        }
        let found = self.variables.iter().rev().find(|(known, _)| known == name);
        match found {
            Some((_, value)) => Ok(value.clone()),
            None => Err(failed(&format!("there is no variable {name}"))),
        }
    }

    fn set(&mut self, name: &str, value: Val<'d>, declares: bool) -> Result<()> {
        if declares {
            self.variables.push((name.into(), value));
            return Ok(());
        }
        match self.variables.iter_mut().rev().find(|(known, _)| known == name) {
            Some((_, known)) => {
                *known = value;
                Ok(())
            }
            None => Err(failed(&format!("there is no variable {name}"))),
        }
    }
}

pub(super) fn failed(reason: &str) -> Error {
    Error::Render(reason.into())
}
