//! The flags of `tierstream serve`.

use std::path::PathBuf;

use clap::Args;
use tierstream::size::{Bytes, PoolShare};
use tierstream_server::{KeepAlive, PromptCache, keep_alive};

use super::{EngineArgs, whole};

const SERVE_EXAMPLES: &str = "\
Examples:
  tierstream serve                                 all models of `tierstream list`, and demo
  tierstream serve model.gguf --ram 8GiB           and one more, by the name of its file
  curl localhost:11434/api/chat -d '{\"model\": \"demo\", \"messages\": [{\"role\": \"user\", \"content\": \"Hi\"}]}'
  OPENAI_BASE_URL=http://localhost:11434/v1 OPENAI_API_KEY=none python program.py

It speaks HTTP: what is to be reached from other machines belongs behind a proxy with TLS.

Exit codes: 0 when it was stopped, 1 for errors, 2 for wrong flags.";

#[derive(Debug, Args)]
#[command(after_help = SERVE_EXAMPLES)]
pub(crate) struct Serve {
    /// Files to serve beside the models of `tierstream list`
    #[arg(value_name = "FILE")]
    pub(crate) files: Vec<PathBuf>,
    /// A file with values for these flags, by their names: ram = "8GiB", origins = ["https://chat.example"].
    /// Flags and environment win over it [default: ~/.config/tierstream/serve.toml if it is there]
    #[arg(long, value_name = "FILE", env = "TIERSTREAM_CONFIG")]
    pub(crate) config: Option<PathBuf>,
    /// The address to listen on: HOST, HOST:PORT or :PORT
    #[arg(long, env = "OLLAMA_HOST", default_value = "127.0.0.1:11434", value_parser = address)]
    pub(crate) host: Address,
    /// How long a model stays loaded after its last request: 300, 5m, 24h; 0: not at all, -1: for ever
    #[arg(
        long,
        value_name = "TIME",
        env = "OLLAMA_KEEP_ALIVE",
        default_value = "5m",
        allow_hyphen_values = true,
        value_parser = keep_alive
    )]
    pub(crate) keep_alive: KeepAlive,
    /// Requests of a model that are computed at the same time; each has a context of its own
    #[arg(long, value_name = "N", env = "OLLAMA_NUM_PARALLEL", default_value_t = 2, value_parser = whole(1..=256u32))]
    pub(crate) parallel: u32,
    /// Models that are loaded at the same time, if all of them fits; one that streams is alone
    #[arg(
        long,
        value_name = "N",
        env = "OLLAMA_MAX_LOADED_MODELS",
        default_value_t = 3,
        value_parser = whole(1..=64u32)
    )]
    pub(crate) max_models: u32,
    /// Requests of a model that wait for their turn; more are refused (503)
    #[arg(long, value_name = "N", env = "OLLAMA_MAX_QUEUE", default_value_t = 512, value_parser = whole(0..=65_536u32))]
    pub(crate) max_queue: u32,
    /// Pages that browsers may call from, beside those of this machine: https://chat.example, or `*`
    #[arg(long, value_name = "ORIGIN,...", env = "OLLAMA_ORIGINS", value_delimiter = ',')]
    pub(crate) origins: Vec<String>,
    /// A file of keys, one a line, of which requests need one
    #[arg(long, value_name = "FILE", env = "TIERSTREAM_API_KEYS")]
    pub(crate) api_keys: Option<PathBuf>,
    /// Seconds that an answer may take
    #[arg(long, value_name = "SECONDS", default_value_t = 3600, value_parser = whole(1..=604_800u32))]
    pub(crate) timeout: u32,
    /// Memory for what was computed of prompts, when their sequence goes to another request; a part of
    /// --ram [default: 256MiB, or a sixteenth of --ram if that is less]
    #[arg(long, value_name = "SIZE")]
    pub(crate) prompt_cache: Option<Bytes>,
    /// Keep it in files of this folder, too: prompts that were known are not computed again after a
    /// restart. The files hold what users wrote
    #[arg(long, value_name = "FOLDER")]
    pub(crate) prompt_folder: Option<PathBuf>,
    /// What those files may take of the drive
    #[arg(long, value_name = "SIZE", default_value = "4GiB")]
    pub(crate) prompt_folder_size: Bytes,
    /// The expert pool of each model alone: a size, or a share of all experts
    #[arg(long, value_name = "SIZE|N%", allow_hyphen_values = true)]
    pub(crate) experts: Option<PoolShare>,
    #[command(flatten)]
    pub(crate) engine: EngineArgs,
}

/// Memory for prompts, where no other number is given.
const PROMPT_CACHE_BYTES: u64 = 256 << 20;

impl Serve {
    /// Where prompts are kept.
    pub(crate) fn prompts(&self) -> PromptCache {
        let share = |ram: Bytes| PROMPT_CACHE_BYTES.min(ram.0 / 16);
        let default = self.engine.ram.map_or(PROMPT_CACHE_BYTES, share);
        PromptCache {
            ram_bytes: self.prompt_cache.map_or(default, |bytes| bytes.0),
            folder: self.prompt_folder.clone(),
            folder_bytes: self.prompt_folder_size.0,
        }
    }
}

/// Where to listen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Address(pub(crate) String);

/// Ollama's port.
const PORT: &str = "11434";

/// Reads an address as Ollama does: a scheme and a path are passed over.
pub(crate) fn address(text: &str) -> Result<Address, String> {
    let rest = text.split_once("://").map_or(text, |(_, rest)| rest);
    let rest = rest.split('/').next().unwrap_or_default().trim();
    let is_port = |port: &str| port.parse::<u16>().is_ok();
    let (host, port) = match rest.rsplit_once(':') {
        Some((host, port)) if is_port(port) && (!host.contains(':') || host.ends_with(']')) => {
            (host, port)
        }
        Some((host, "")) => (host, PORT),
        _ => (rest, PORT),
    };
    let host = match host {
        "" => "127.0.0.1".to_owned(),
        host if host.contains(':') && !host.starts_with('[') => format!("[{host}]"),
        host => host.to_owned(),
    };
    if host.contains(char::is_whitespace) {
        return Err("it is HOST, HOST:PORT or :PORT".into());
    }
    Ok(Address(format!("{host}:{port}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_ollama_does() {
        for (text, wanted) in [
            ("0.0.0.0", "0.0.0.0:11434"),
            ("localhost:80", "localhost:80"),
            (":8080", "127.0.0.1:8080"),
            ("", "127.0.0.1:11434"),
            ("http://box:1/api", "box:1"),
            ("https://box/", "box:11434"),
            ("::1", "[::1]:11434"),
            ("[::1]:5", "[::1]:5"),
            ("[::1]", "[::1]:11434"),
        ] {
            assert_eq!(address(text), Ok(Address(wanted.into())), "{text}");
        }
        assert!(address("a b").is_err());
    }
}
