//! The flags of `tierstream serve`.

use std::path::PathBuf;

use clap::Args;
use clap::builder::UnknownArgumentValueParser;
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
    /// Files to serve, by their names, beside the models of `tierstream list`; one of these is looked for
    /// now, and not when a client asks for it
    #[arg(value_name = "MODEL")]
    pub(crate) models: Vec<PathBuf>,
    /// A file with values for these flags, by their names: ram = "8GiB", origins = ["https://chat.example"].
    /// Flags and environment win over it [default: ~/.config/tierstream/serve.toml if it is there]
    #[arg(long, value_name = "FILE", env = "TIERSTREAM_CONFIG")]
    pub(crate) config: Option<PathBuf>,
    /// The address to listen on: HOST, HOST:PORT or :PORT
    #[arg(long, env = "OLLAMA_HOST", default_value = "127.0.0.1:11434", value_parser = address)]
    pub(crate) host: Address,
    #[arg(long, hide = true, value_parser = UnknownArgumentValueParser::suggest(PORT_TIP))]
    pub(crate) port: Option<String>,
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
    /// Requests of a model that are computed at the same time; each has a context of its own; 0: 2
    #[arg(long, value_name = "N", env = "OLLAMA_NUM_PARALLEL", default_value_t = 2, value_parser = or_usual(256, 2))]
    pub(crate) parallel: u32,
    /// Models that are loaded at the same time, if all of them fits; one that streams is alone; 0: 3
    #[arg(
        long,
        value_name = "N",
        env = "OLLAMA_MAX_LOADED_MODELS",
        default_value_t = 3,
        value_parser = or_usual(64, 3)
    )]
    pub(crate) max_models: u32,
    /// Requests of a model that wait for their turn; more are refused (503); 0: 512
    #[arg(long, value_name = "N", env = "OLLAMA_MAX_QUEUE", default_value_t = 512, value_parser = or_usual(65_536, 512))]
    pub(crate) max_queue: u32,
    /// Ollama's name for --ctx, over which that wins; 0: as usual
    #[arg(long, value_name = "N", env = "OLLAMA_CONTEXT_LENGTH", hide = true, value_parser = or_usual(16_777_216, 0))]
    pub(crate) context_length: Option<u32>,
    /// Record where the tokens of all requests are routed to, in files of this folder, without the tokens
    /// themselves. A file gets its name when it is full, or the model is unloaded
    #[arg(long, value_name = "DIR")]
    pub(crate) trace: Option<PathBuf>,
    /// Pages that browsers may call from, beside those of this machine, and names of proxies before it:
    /// https://chat.example, or `*`
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

/// What `--port` is told, which other servers have.
pub(super) const PORT_TIP: &str = "the port belongs to the address: --host :8080";

/// What `--ram` bounds here.
pub(super) const RAM_HELP: &str = "All host memory of the server, for all models together: weights, contexts, experts, \
     kept prompts, connections (8GiB, 800MB) [default: most of what is free]. With --gpu: their pinned memory for \
     experts that do not fit the GPU's [default: half of what is free]";

/// What `--vram` bounds here.
pub(super) const VRAM_HELP: &str = "With --gpu: all of the GPU's memory for all models together (6GiB) [default: 90 % of what is free]";

/// Memory for prompts, where no other number is given.
const PROMPT_CACHE_BYTES: u64 = 256 << 20;

impl Serve {
    /// Tokens of context where a request says nothing, if it was said.
    pub(crate) fn ctx(&self) -> Option<u32> {
        self.engine.ctx.or(self.context_length.filter(|&tokens| tokens > 0))
    }

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

/// The least --ram that leaves so many bytes beside the prompts that are kept. `cache`: as `--prompt-cache` says.
pub(crate) fn ram_with_prompts(cache: Option<Bytes>, bytes: u64) -> u64 {
    match cache {
        Some(cache) => bytes + cache.0,
        // A sixteenth of the sum, if that is less.
        None => (bytes + PROMPT_CACHE_BYTES).min(bytes.div_ceil(15) * 16),
    }
}

/// Reads a number up to `most`, as Ollama reads those of its variables: there may be quotes around it, and 0 is
/// `usual`.
fn or_usual(most: u32, usual: u32) -> impl Fn(&str) -> Result<u32, String> + Clone + Send + Sync {
    move |text| match whole(0..=most)(unquoted(text))? {
        0 => Ok(usual),
        n => Ok(n),
    }
}

/// As Ollama reads all of its variables.
fn unquoted(text: &str) -> &str {
    text.trim().trim_matches(['"', '\''])
}

/// Where to listen, or where a server listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Address {
    /// `HOST:PORT`.
    pub(crate) host: String,
    /// It is reached by HTTPS, as behind a proxy.
    pub(crate) is_https: bool,
}

/// Ollama's port.
const PORT: &str = "11434";

/// Reads an address as Ollama does: a scheme has its usual port, a path is passed over.
pub(crate) fn address(text: &str) -> Result<Address, String> {
    let text = unquoted(text);
    let (scheme, rest) = text.split_once("://").unwrap_or(("", text));
    let usual = match scheme {
        "http" => "80",
        "https" => "443",
        _ => PORT,
    };
    let rest = rest.split('/').next().unwrap_or_default().trim();
    let (host, port) = match rest.rsplit_once(':') {
        Some((host, "")) => (host, usual),
        Some((host, port)) if !host.contains(':') || host.ends_with(']') => (host, port),
        _ => (rest, usual),
    };
    if port.parse::<u16>().is_err() {
        return Err(format!("{port:?} is no port: they go up to 65535"));
    }
    let host = match host {
        "" => "127.0.0.1".to_owned(),
        host if host.contains(':') && !host.starts_with('[') => format!("[{host}]"),
        host => host.to_owned(),
    };
    if host.contains(char::is_whitespace) {
        return Err("it is HOST, HOST:PORT or :PORT".into());
    }
    Ok(Address { host: format!("{host}:{port}"), is_https: scheme == "https" })
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::super::{Cli, Command};
    use super::*;

    #[test]
    fn addresses_are_read_as_ollama_does() {
        for (text, wanted) in [
            ("0.0.0.0", "0.0.0.0:11434"),
            ("localhost:80", "localhost:80"),
            (":8080", "127.0.0.1:8080"),
            ("", "127.0.0.1:11434"),
            ("http://box:1/api", "box:1"),
            ("http://box", "box:80"),
            ("https://box/", "box:443"),
            ("https://[::1]", "[::1]:443"),
            ("https://box:1", "box:1"),
            ("tcp://box", "box:11434"),
            ("box:", "box:11434"),
            (" \"box\" ", "box:11434"),
            ("::1", "[::1]:11434"),
            ("[::1]:5", "[::1]:5"),
            ("[::1]", "[::1]:11434"),
        ] {
            let is_https = text.contains("https:");
            assert_eq!(address(text), Ok(Address { host: wanted.into(), is_https }), "{text}");
        }
        for text in ["a b", "box:65536", "box:x", "[::1]:x"] {
            assert!(address(text).is_err(), "{text}");
        }
    }

    #[test]
    fn the_least_budget_leaves_what_is_needed_beside_the_prompts() {
        for cache in [&[][..], &["--prompt-cache", "1MiB"]] {
            let serve = |ram: u64| {
                let args = ["tierstream", "serve", "--ram", &format!("{ram}B")];
                match Cli::parse_from([&args[..], cache].concat()).command {
                    Command::Serve(args) => args,
                    _ => unreachable!("it is serve"),
                }
            };
            for needed in [1 << 20, 200 << 20, (4 << 30) - 1, 64 << 30] {
                let ram = ram_with_prompts(serve(0).prompt_cache, needed);
                let left = ram - serve(ram).prompts().ram_bytes;
                assert!((needed..needed + 32).contains(&left), "{needed}: {ram} leave {left}");
            }
        }
    }

    #[test]
    fn numbers_are_read_as_ollama_does() {
        let read = or_usual(64, 3);
        for (text, wanted) in [("0", 3), ("1", 1), (" '64' ", 64), ("\"7\"", 7)] {
            assert_eq!(read(text), Ok(wanted), "{text}");
        }
        for text in ["", "-1", "65", "x", "1.5"] {
            assert!(read(text).is_err(), "{text}");
        }
    }
}
