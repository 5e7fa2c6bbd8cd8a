//! The pieces of a Go template to its tree.

use std::collections::BTreeSet;

use serde_json::Value;

use super::lex::{self, Kind, Piece, Word};
use crate::error::{Error, Result};
use crate::limits;

/// A part of a template.
#[derive(Clone, Debug)]
pub(super) enum Node {
    Text(String),
    Action(Pipe),
    /// `if` or `with`, which makes what it tests the dot.
    If {
        pipe: Pipe,
        is_with: bool,
        then: Vec<Node>,
        otherwise: Vec<Node>,
    },
    Range {
        pipe: Pipe,
        body: Vec<Node>,
        otherwise: Vec<Node>,
    },
    Break,
    Continue,
}

/// `$a, $b := command | command`.
#[derive(Clone, Debug, Default)]
pub(super) struct Pipe {
    pub(super) variables: Vec<String>,
    /// Whether the variables are new ones.
    pub(super) declares: bool,
    pub(super) commands: Vec<Command>,
}

/// A value, or a function with its arguments.
#[derive(Clone, Debug)]
pub(super) struct Command {
    pub(super) arguments: Vec<Operand>,
}

/// A value with a chain of fields behind it.
#[derive(Clone, Debug)]
pub(super) struct Operand {
    pub(super) base: Base,
    pub(super) fields: Vec<String>,
}

/// What an operand begins with.
#[derive(Clone, Debug)]
pub(super) enum Base {
    Dot,
    Variable(String),
    Function(String),
    Literal(Value),
    Pipe(Box<Pipe>),
}

impl Node {
    /// `{{ .Response }}`
    pub(super) fn response() -> Self {
        let operand = Operand { base: Base::Dot, fields: vec!["Response".into()] };
        let command = Command { arguments: vec![operand] };
        Self::Action(Pipe { commands: vec![command], ..Pipe::default() })
    }
}

/// The tree of a template.
pub(super) fn parse(source: &str) -> Result<Vec<Node>> {
    let mut parser = Parser { pieces: lex::pieces(source)?.into_iter(), line: 1 };
    let (nodes, end) = parser.block(0)?;
    match end {
        End::Source => Ok(nodes),
        End::Closed => Err(parser.failed("an end is outside of a block")),
        End::Else(_) => Err(parser.failed("an else is outside of a block")),
    }
}

/// The names of fields and variables in a tree, in lower case and without dollars.
pub(super) fn names(nodes: &[Node], found: &mut BTreeSet<String>) {
    for node in nodes {
        match node {
            Node::Text(_) | Node::Break | Node::Continue => {}
            Node::Action(pipe) => pipe_names(pipe, found),
            Node::If { pipe, then, otherwise, .. } => {
                pipe_names(pipe, found);
                names(then, found);
                names(otherwise, found);
            }
            Node::Range { pipe, body, otherwise } => {
                pipe_names(pipe, found);
                names(body, found);
                names(otherwise, found);
            }
        }
    }
}

fn pipe_names(pipe: &Pipe, found: &mut BTreeSet<String>) {
    for operand in pipe.commands.iter().flat_map(|c| &c.arguments) {
        found.extend(operand.fields.iter().map(|name| name.to_lowercase()));
        if let Base::Pipe(pipe) = &operand.base {
            pipe_names(pipe, found);
        }
    }
}

/// The tree up to the first action that prints the response, in whatever block it is.
pub(super) fn up_to_response(nodes: &[Node]) -> Vec<Node> {
    let mut nodes = nodes.to_vec();
    cut(&mut nodes);
    nodes
}

/// Removes what follows the response; whether it was there.
fn cut(nodes: &mut Vec<Node>) -> bool {
    let mut found = None;
    for (i, node) in nodes.iter_mut().enumerate() {
        let is_here = match node {
            Node::Text(_) | Node::Break | Node::Continue => false,
            Node::Action(pipe) => prints_response(pipe),
            Node::If { then, otherwise, .. } | Node::Range { body: then, otherwise, .. } => {
                if cut(then) {
                    otherwise.clear();
                    true
                } else {
                    cut(otherwise)
                }
            }
        };
        if is_here {
            found = Some(i);
            break;
        }
    }
    if let Some(at) = found {
        nodes.truncate(at + 1);
    }
    found.is_some()
}

fn prints_response(pipe: &Pipe) -> bool {
    pipe.commands.iter().flat_map(|c| &c.arguments).any(|operand| match &operand.base {
        Base::Pipe(pipe) => prints_response(pipe),
        Base::Dot => operand.fields.iter().any(|name| name == "Response"),
        _ => false,
    })
}

/// What a block ended with. An `else` may go on, as `else if`.
enum End {
    Source,
    Closed,
    Else(Vec<Word>),
}

struct Parser {
    pieces: std::vec::IntoIter<Piece>,
    line: usize,
}

impl Parser {
    fn failed(&self, reason: &str) -> Error {
        Error::Syntax { line: self.line, reason: reason.into() }
    }

    /// Nodes up to the end of a block.
    fn block(&mut self, depth: usize) -> Result<(Vec<Node>, End)> {
        if depth > limits::GO_DEPTH {
            return Err(self.failed("blocks are nested too deep"));
        }
        let mut nodes = Vec::new();
        while let Some(piece) = self.pieces.next() {
            let (words, line) = match piece {
                Piece::Text(text) => {
                    nodes.push(Node::Text(text));
                    continue;
                }
                Piece::Action { words, line } => (words, line),
            };
            self.line = line;
            let keyword = match words.first() {
                Some(Word { kind: Kind::Name(name), .. }) => name.clone(),
                Some(_) => String::new(),
                None => return Err(self.failed("an action is empty")),
            };
            match keyword.as_str() {
                "end" => return Ok((nodes, End::Closed)),
                "else" => return Ok((nodes, End::Else(words[1..].to_vec()))),
                "if" | "with" | "range" => nodes.push(self.branch(&words, depth)?),
                "break" => nodes.push(Node::Break),
                "continue" => nodes.push(Node::Continue),
                "define" | "template" | "block" => {
                    return Err(self.failed(&format!("{keyword} is not supported")));
                }
                _ => nodes.push(Node::Action(self.pipe(&words)?)),
            }
        }
        Ok((nodes, End::Source))
    }

    /// An `if`, `with` or `range`, to its end.
    fn branch(&mut self, words: &[Word], depth: usize) -> Result<Node> {
        let Kind::Name(keyword) = &words[0].kind else {
            return Err(self.failed("a keyword is missing"));
        };
        let pipe = self.pipe(&words[1..])?;
        let (then, end) = self.block(depth + 1)?;
        let otherwise = match end {
            End::Source => return Err(self.failed(&format!("{keyword} has no end"))),
            End::Closed => Vec::new(),
            // The end of the inner one is the end of both.
            End::Else(words) if !words.is_empty() => {
                if !matches!(&words[0].kind, Kind::Name(name) if name == "if" || name == "with") {
                    return Err(self.failed("an else goes on with neither if nor with"));
                }
                vec![self.deeper_branch(&words, depth)?]
            }
            End::Else(_) => match self.block(depth + 1)? {
                (nodes, End::Closed) => nodes,
                _ => return Err(self.failed("an else has no end")),
            },
        };
        Ok(match keyword.as_str() {
            "range" => Node::Range { pipe, body: then, otherwise },
            keyword => Node::If { pipe, is_with: keyword == "with", then, otherwise },
        })
    }

    fn deeper_branch(&mut self, words: &[Word], depth: usize) -> Result<Node> {
        if depth >= limits::GO_DEPTH {
            return Err(self.failed("blocks are nested too deep"));
        }
        self.branch(words, depth + 1)
    }

    fn pipe(&self, words: &[Word]) -> Result<Pipe> {
        let mut rest = words;
        let pipe = self.pipe_until(&mut rest, false, 0)?;
        if rest.is_empty() { Ok(pipe) } else { Err(self.failed("a parenthesis is too much")) }
    }

    /// A pipe up to the end of the words, or to a closing parenthesis.
    fn pipe_until(&self, rest: &mut &[Word], in_parens: bool, depth: usize) -> Result<Pipe> {
        if depth > limits::GO_DEPTH {
            return Err(self.failed("parentheses are nested too deep"));
        }
        let mut pipe = declaration(rest);
        let mut arguments = Vec::new();
        loop {
            let Some((word, tail)) = rest.split_first() else {
                if in_parens {
                    return Err(self.failed("a parenthesis is not closed"));
                }
                break;
            };
            match &word.kind {
                Kind::Close if in_parens => {
                    *rest = tail;
                    break;
                }
                Kind::Close => break,
                Kind::Pipe => {
                    *rest = tail;
                    let arguments = std::mem::take(&mut arguments);
                    pipe.commands.push(self.command(arguments)?);
                }
                _ => {
                    let operand = self.operand(rest, depth)?;
                    arguments.push(operand);
                }
            }
        }
        pipe.commands.push(self.command(arguments)?);
        Ok(pipe)
    }

    fn command(&self, arguments: Vec<Operand>) -> Result<Command> {
        match arguments.first() {
            None => Err(self.failed("a command is missing")),
            Some(first) if arguments.len() > 1 && !matches!(first.base, Base::Function(_)) => {
                Err(self.failed("arguments are given to what is no function"))
            }
            Some(_) => Ok(Command { arguments }),
        }
    }

    fn operand(&self, rest: &mut &[Word], depth: usize) -> Result<Operand> {
        let Some((word, tail)) = rest.split_first() else {
            return Err(self.failed("a value is missing"));
        };
        *rest = tail;
        let mut fields = Vec::new();
        let base = match &word.kind {
            Kind::Dot => Base::Dot,
            Kind::Field(name) => {
                fields.push(name.clone());
                Base::Dot
            }
            Kind::Variable(name) => Base::Variable(name.clone()),
            Kind::Name(name) => match name.as_str() {
                "true" => Base::Literal(true.into()),
                "false" => Base::Literal(false.into()),
                "nil" => Base::Literal(Value::Null),
                name if super::functions::is_known(name) => Base::Function(name.into()),
                name => return Err(self.failed(&format!("there is no function {name}"))),
            },
            Kind::Text(text) => Base::Literal(text.clone().into()),
            Kind::Int(int) => Base::Literal((*int).into()),
            Kind::Float(float) => Base::Literal((*float).into()),
            Kind::Open => Base::Pipe(Box::new(self.pipe_until(rest, true, depth + 1)?)),
            _ => return Err(self.failed("a value is missing")),
        };
        while let Some((Word { kind: Kind::Field(name), joined: true }, tail)) = rest.split_first()
        {
            fields.push(name.clone());
            *rest = tail;
        }
        Ok(Operand { base, fields })
    }
}

/// `$a, $b :=` or `$a =`, if the words begin so.
fn declaration(rest: &mut &[Word]) -> Pipe {
    let mut variables = Vec::new();
    let mut words = *rest;
    while let [Word { kind: Kind::Variable(name), .. }, next, ..] = words {
        variables.push(name.clone());
        match next.kind {
            Kind::Comma => words = &words[2..],
            Kind::Declare | Kind::Assign => {
                *rest = &words[2..];
                let declares = next.kind == Kind::Declare;
                return Pipe { variables, declares, commands: Vec::new() };
            }
            _ => break,
        }
    }
    Pipe::default()
}
