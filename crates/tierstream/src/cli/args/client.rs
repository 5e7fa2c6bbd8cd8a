//! The flags of what asks a running server.

use std::path::PathBuf;

use clap::Args;
use clap::builder::UnknownArgumentValueParser;

use super::serve::{Address, PORT_TIP, address};

#[derive(Debug, Args)]
pub(crate) struct Ps {
    #[command(flatten)]
    pub(crate) server: ServerArgs,
}

#[derive(Debug, Args)]
pub(crate) struct Stop {
    /// The model, as `tierstream ps` tells it
    pub(crate) model: String,
    #[command(flatten)]
    pub(crate) server: ServerArgs,
}

/// Which server.
#[derive(Debug, Args)]
pub(crate) struct ServerArgs {
    /// Where the server listens: HOST, HOST:PORT or :PORT
    #[arg(long, env = "OLLAMA_HOST", default_value = "127.0.0.1:11434", value_parser = address)]
    pub(crate) host: Address,
    #[arg(long, hide = true, value_parser = UnknownArgumentValueParser::suggest(PORT_TIP))]
    pub(crate) port: Option<String>,
    /// The file of keys that it was started with, of which the first is used
    #[arg(long, value_name = "FILE", env = "TIERSTREAM_API_KEYS")]
    pub(crate) api_keys: Option<PathBuf>,
}
