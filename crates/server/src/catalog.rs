//! The models that there are, and what their headers tell.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use axum::http::StatusCode;
use sha2::{Digest, Sha256};
use tierstream_chat::{Capabilities, Template};
use tierstream_gguf::{Metadata, Value};
use tierstream_store::{Layers, Store, Tool};

use crate::engine::{Extra, Token};
use crate::error::{ApiError, ApiResult};

/// The models of all stores, and those of the program.
pub(crate) struct Catalog {
    store: Store,
    extras: Vec<Extra>,
    /// By path; read again when the file has changed.
    headers: Mutex<HashMap<PathBuf, (Stamp, Arc<Header>)>>,
    /// What names led to a moment ago: each request has one, and to find it folders are read.
    found: Mutex<HashMap<String, (Instant, Found)>>,
}

/// How long a name leads to what it led to.
const FOUND_TIME_MAX: Duration = Duration::from_secs(1);

type Stamp = (u64, SystemTime);

/// A model that was found by its name.
#[derive(Debug, Clone)]
pub(crate) struct Found {
    pub(crate) name: String,
    pub(crate) path: PathBuf,
    pub(crate) bytes: u64,
    pub(crate) layers: Layers,
    pub(crate) tool: Option<Tool>,
}

/// What a model's file tells of it.
#[derive(Debug, Clone)]
pub(crate) struct Header {
    pub(crate) architecture: String,
    /// Numbers, words and flags of the header, without lists.
    pub(crate) keys: serde_json::Map<String, serde_json::Value>,
    pub(crate) parameters: u64,
    pub(crate) quant: String,
    pub(crate) context_length: Option<u32>,
    pub(crate) chat_template: Option<String>,
    pub(crate) modified: SystemTime,
    /// Names this state of the file.
    pub(crate) digest: String,
}

impl Catalog {
    pub(crate) fn new(store: Store, extras: Vec<Extra>) -> Self {
        Self { store, extras, headers: Mutex::default(), found: Mutex::default() }
    }

    /// The model of that name. Reads directories.
    pub(crate) fn find(&self, name: &str) -> ApiResult<Found> {
        if name.is_empty() {
            return Err(ApiError::of("model", "model is required"));
        }
        let plain = name.strip_suffix(":latest").unwrap_or(name);
        if let Some(extra) = self.extras.iter().find(|extra| extra.name == plain) {
            return Ok(of_extra(extra));
        }
        let remembered = || self.found.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((since, found)) = remembered().get(name)
            && since.elapsed() < FOUND_TIME_MAX
        {
            return Ok(found.clone());
        }
        let model = self.store.find(name)?;
        let tool = Some(model.tool);
        let found = Found {
            name: model.name,
            path: model.path,
            bytes: model.bytes,
            layers: model.layers,
            tool,
        };
        let mut remembered = remembered();
        remembered.retain(|_, (since, _)| since.elapsed() < FOUND_TIME_MAX);
        remembered.insert(name.to_owned(), (Instant::now(), found.clone()));
        Ok(found)
    }

    /// All that can be used.
    pub(crate) fn list(&self) -> Vec<Found> {
        let listed = self.store.list().models.into_iter().filter_map(|listed| {
            let model = listed.model.ok()?;
            let tool = Some(listed.tool);
            let (path, bytes, layers) = (model.path, model.bytes, model.layers);
            Some(Found { name: listed.name, path, bytes, layers, tool })
        });
        self.extras.iter().map(of_extra).chain(listed).collect()
    }

    /// What a model's header tells.
    pub(crate) fn header(&self, path: &Path) -> ApiResult<Arc<Header>> {
        let unreadable =
            |error: &dyn std::fmt::Display| ApiError::bad(format!("{}: {error}", path.display()));
        let file = std::fs::metadata(path).map_err(|error| unreadable(&error))?;
        let stamp = (file.len(), file.modified().unwrap_or(SystemTime::UNIX_EPOCH));
        let headers = || self.headers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((known, header)) = headers().get(path)
            && *known == stamp
        {
            return Ok(header.clone());
        }
        let header = Arc::new(read(path, stamp).map_err(|error| unreadable(&error))?);
        headers().insert(path.to_owned(), (stamp, header.clone()));
        Ok(header)
    }
}

fn of_extra(extra: &Extra) -> Found {
    let bytes = std::fs::metadata(&extra.path).map_or(0, |file| file.len());
    let (name, path, layers) = (extra.name.clone(), extra.path.clone(), Layers::default());
    Found { name, path, bytes, layers, tool: None }
}

fn read(path: &Path, stamp: Stamp) -> Result<Header, tierstream_pack::Error> {
    let file = tierstream_pack::open(path)?;
    let metadata = file.metadata();
    let named = format!("{}\0{}\0{:?}", path.display(), stamp.0, stamp.1);
    let digest = Sha256::digest(named.as_bytes());
    let text = |key: &str| metadata.str(key).ok().flatten().map(str::to_owned);
    Ok(Header {
        architecture: file.architecture().to_owned(),
        keys: keys(metadata),
        parameters: file.tensors().iter().map(|t| t.dims.iter().product::<u64>()).sum(),
        quant: quant(metadata),
        context_length: file.arch_u32("context_length").ok().flatten(),
        chat_template: text("tokenizer.chat_template"),
        modified: stamp.1,
        digest: digest.iter().map(|byte| format!("{byte:02x}")).collect(),
    })
}

fn keys(metadata: &Metadata) -> serde_json::Map<String, serde_json::Value> {
    let plain = |value: &Value| match value {
        Value::Str(text) => Some(text.clone().into()),
        Value::Bool(flag) => Some((*flag).into()),
        Value::F32(x) => Some(f64::from(*x).into()),
        Value::F64(x) => Some((*x).into()),
        other => other.integer().and_then(|n| i64::try_from(n).ok()).map(Into::into),
    };
    let all = metadata.iter().filter(|(key, _)| *key != "tokenizer.chat_template");
    all.filter_map(|(key, value)| Some((key.to_owned(), plain(value)?))).collect()
}

/// The name of `general.file_type` (`llama_ftype` in llama.h).
fn quant(metadata: &Metadata) -> String {
    const NAMES: [(u32, &str); 24] = [
        (0, "F32"),
        (1, "F16"),
        (2, "Q4_0"),
        (3, "Q4_1"),
        (7, "Q8_0"),
        (8, "Q5_0"),
        (9, "Q5_1"),
        (10, "Q2_K"),
        (11, "Q3_K_S"),
        (12, "Q3_K_M"),
        (13, "Q3_K_L"),
        (14, "Q4_K_S"),
        (15, "Q4_K_M"),
        (16, "Q5_K_S"),
        (17, "Q5_K_M"),
        (18, "Q6_K"),
        (19, "IQ2_XXS"),
        (20, "IQ2_XS"),
        (23, "IQ3_XXS"),
        (25, "IQ4_NL"),
        (30, "IQ4_XS"),
        (32, "BF16"),
        (36, "TQ1_0"),
        (38, "MXFP4"),
    ];
    let kind = metadata.u32("general.file_type").ok().flatten();
    let name = NAMES.iter().find(|(id, _)| Some(*id) == kind);
    name.map_or("unknown", |(_, name)| name).to_owned()
}

/// A template for models that have none: they go on from the text.
const NO_TEMPLATE: &str = "{{ if .System }}{{ .System }}\n\n{{ end }}{{ .Prompt }}";

/// What chats with a model go through.
pub(crate) fn template(
    found: &Found,
    header: &Header,
    bos_eos: (&str, &str),
) -> ApiResult<Template> {
    let go = found.layers.template.as_deref().map(small_file).transpose()?;
    match Template::of_model(header.chat_template.as_deref(), go.as_deref(), bos_eos)? {
        Some(template) => Ok(template),
        None => Ok(Template::go(NO_TEMPLATE)?),
    }
}

/// Bytes of a layer of text that are read.
const LAYER_BYTES_MAX: u64 = 1 << 20;

/// A text that belongs to a model.
pub(crate) fn small_file(path: &Path) -> ApiResult<String> {
    let unreadable = |error: &dyn std::fmt::Display| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        ApiError::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            format!("the model's layer {name}: {error}"),
        )
    };
    let len = std::fs::metadata(path).map_err(|error| unreadable(&error))?.len();
    if len > LAYER_BYTES_MAX {
        return Err(unreadable(&format!("{len} bytes are too many; {LAYER_BYTES_MAX} are read")));
    }
    std::fs::read_to_string(path).map_err(|error| unreadable(&error))
}

/// What Ollama's clients are told that a model can do.
pub(crate) fn capabilities(header: &Header, of: Capabilities) -> Vec<&'static str> {
    // Encoders' headers say how their tokens become one embedding.
    if header.keys.contains_key(&format!("{}.pooling_type", header.architecture)) {
        return vec!["embedding"];
    }
    let all = [
        (true, "completion"),
        (of.tools, "tools"),
        (of.thinking, "thinking"),
        (of.insert || fim_tokens(header).is_some(), "insert"),
    ];
    all.into_iter().filter(|(has, _)| *has).map(|(_, name)| name).collect()
}

/// The tokens before a text, before what comes behind the gap, and before what goes there, of models that were
/// trained to fill one.
pub(crate) fn fim_tokens(header: &Header) -> Option<[Token; 3]> {
    let id = |names: [&str; 2]| {
        let keys = names.map(|name| format!("tokenizer.ggml.{name}_token_id"));
        let value = keys.iter().find_map(|key| header.keys.get(key)?.as_i64())?;
        Token::try_from(value).ok()
    };
    Some([id(["fim_pre", "prefix"])?, id(["fim_suf", "suffix"])?, id(["fim_mid", "middle"])?])
}

/// As Ollama writes it: `30.5B`.
pub(crate) fn parameter_size(n: u64) -> String {
    match n as f64 {
        n if n >= 1e9 => format!("{:.1}B", n / 1e9),
        n if n >= 1e6 => format!("{:.1}M", n / 1e6),
        n => format!("{:.1}K", n / 1e3),
    }
}
