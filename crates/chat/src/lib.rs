//! Chat messages to the text that a model reads, and the text that it writes back to thinking, content
//! and tool calls. No I/O and no clock: whoever calls brings the template, the messages and the time.
//!
//! ```
//! use tierstream_chat::{DateTime, Delta, Message, Parser, Reply, Request, Template};
//!
//! # fn main() -> Result<(), tierstream_chat::Error> {
//! let source = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
//!               {% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}";
//! let template = Template::jinja(source, "<s>", "</s>")?;
//! let messages = [Message::new("user", "Is it raining?")];
//! let prompt = template.render(&Request::new(&messages, DateTime::from_unix(0)))?;
//! assert!(prompt.starts_with("<|im_start|>user\nIs it raining?"));
//!
//! let format = template.format();
//! let mut parser = Parser::new(&format, &[], format.opens_thinking(&prompt));
//! let mut reply = Reply::default();
//! for piece in ["Let me look.</th", "ink>\n\nNo."] {
//!     reply.extend(parser.feed(piece));
//! }
//! reply.extend(parser.finish());
//! assert_eq!((reply.thinking.as_str(), reply.content.as_str()), ("Let me look.", "No."));
//! # Ok(())
//! # }
//! ```
//!
//! Templates and a model's text come from somebody else: what they may take of time and memory has
//! [`limits`], and nothing that they say is a panic. [`Template`] is Jinja, as in a GGUF's
//! `tokenizer.chat_template` (`jinja.rs`), or Go's `text/template`, as in Ollama's store (`go/`). How a
//! model writes its thinking and its calls is a [`Format`] (`format.rs` has the table), which [`Parser`]
//! reads as text comes (`parser/`), and which a grammar can hold the model to (`grammar.rs`).

#![forbid(unsafe_code)]

mod error;
mod format;
mod go;
mod grammar;
mod jinja;
pub mod limits;
mod message;
mod parser;
mod reply;
mod template;
mod time;

pub use error::{Error, Result};
pub use format::Format;
pub use grammar::{GrammarOptions, Which};
pub use message::{Function, Message, Think, Tool, ToolCall};
pub use parser::{Delta, Parser};
pub use reply::Reply;
pub use template::{Capabilities, Request, Template};
pub use time::DateTime;
