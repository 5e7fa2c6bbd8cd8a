//! `tierstream list`: the models of all stores, with what their headers tell.

use std::path::Path;
use std::process::ExitCode;

use serde::Serialize;
use tierstream::gguf::Experts;
use tierstream::pack;
use tierstream::size::Bytes;
use tierstream_store::{Environment, Listed, Model, Store, Tool};

use super::args::Cli;
use super::named;
use super::output::{self, Progress};

/// The answer of `list`; `docs/json.md` tells what the fields are.
#[derive(Debug, Serialize)]
struct Answer {
    models: Vec<Row>,
    unreadable: Vec<Problem>,
}

/// A model. What is not known of one that is broken is none.
#[derive(Debug, Serialize)]
struct Row {
    name: String,
    source: &'static str,
    #[serde(skip)]
    tool: Tool,
    path: String,
    file_bytes: Option<u64>,
    #[serde(flatten)]
    header: Header,
    broken: Option<Problem>,
}

/// What a model's header tells.
#[derive(Debug, Default, Serialize)]
struct Header {
    architecture: Option<String>,
    moe_layers: Option<usize>,
    experts: Option<u32>,
    experts_used: Option<u32>,
    packed: Option<bool>,
}

#[derive(Debug, Serialize)]
struct Problem {
    error: String,
    hint: Option<String>,
}

pub(crate) fn list(cli: &Cli) -> anyhow::Result<ExitCode> {
    let environment = Environment::of_process();
    let listing = Store::new(&environment).list();
    let progress = Progress::start("reading headers");
    let count = listing.models.len();
    let mut models = Vec::with_capacity(count);
    for (index, model) in listing.models.into_iter().enumerate() {
        progress.set(index as f32 / count as f32);
        models.push(Row::of(model));
    }
    drop(progress);
    let missing = named::missing_folders(&environment).into_iter();
    let missing = missing.map(|error| Problem { error, hint: None });
    let unreadable = listing.unreadable.into_iter().map(|e| Problem::of(e.hint(), e.into()));
    let unreadable = unreadable.chain(missing);
    let answer = Answer { models, unreadable: unreadable.collect() };
    if cli.json {
        output::json(&answer)?;
        return Ok(ExitCode::SUCCESS);
    }
    output::print(&table(&answer.models))?;
    for Problem { error, hint } in &answer.unreadable {
        let hint = hint.as_ref().map_or(String::new(), |hint| format!("; {hint}"));
        output::note(format!("{error}{hint}"));
    }
    if answer.models.is_empty() {
        output::note(
            "there is no model of Ollama's, of LM Studio's, of llama.cpp's or in the Hugging Face \
             cache; TIERSTREAM_MODELS names folders with others",
        );
    }
    Ok(ExitCode::SUCCESS)
}

impl Row {
    fn of(listed: Listed) -> Self {
        let Listed { name, tool, path, model } = listed;
        let read = |model: Model| match Header::read(&model.path) {
            Ok(header) => (model, Ok(header)),
            Err(error) => (model, Err(Problem::of(error.hint(), error.into()))),
        };
        let (path, file_bytes, header) = match model.map(read) {
            Ok((model, header)) => (model.path, Some(model.bytes), header),
            Err(error) => (path, None, Err(Problem::of(error.hint(), error.into()))),
        };
        let (header, broken) = match header {
            Ok(header) => (header, None),
            Err(problem) => (Header::default(), Some(problem)),
        };
        let path = path.display().to_string();
        Self { name, source: tool.id(), tool, path, file_bytes, header, broken }
    }

    /// Layers and experts, in words.
    fn shape(&self) -> String {
        match (self.header.moe_layers, self.header.experts, self.header.experts_used) {
            (Some(0), ..) => "dense".to_owned(),
            (Some(layers), Some(experts), Some(used)) => {
                format!("{layers} x {experts}, {used} used")
            }
            _ => "-".to_owned(),
        }
    }
}

impl Header {
    fn read(path: &Path) -> tierstream::Result<Self> {
        let file = pack::open(path)?;
        let experts = Experts::group(&file)?;
        let layers = experts.layers();
        Ok(Self {
            architecture: Some(output::printable(file.architecture())),
            moe_layers: Some(layers.len()),
            experts: Some(layers.iter().map(|l| l.experts).max().unwrap_or(0)),
            experts_used: Some(layers.iter().map(|l| l.used).max().unwrap_or(0)),
            packed: Some(file.originals().is_some()),
        })
    }
}

impl Problem {
    fn of(hint: Option<String>, error: anyhow::Error) -> Self {
        Self { error: format!("{error:#}"), hint }
    }
}

/// Names, then what is known of each; why one is broken stands where its path would.
fn table(rows: &[Row]) -> String {
    if rows.is_empty() {
        return String::new();
    }
    let cells = |row: &Row| {
        let file = match &row.broken {
            Some(problem) => format!("broken: {}", problem.error),
            None => row.path.clone(),
        };
        [
            row.name.clone(),
            row.file_bytes.map_or("-".to_owned(), |bytes| Bytes(bytes).to_string()),
            row.header.architecture.clone().unwrap_or("-".to_owned()),
            row.shape(),
            row.tool.to_string(),
            file,
        ]
    };
    let titles = ["NAME", "SIZE", "ARCHITECTURE", "EXPERTS", "SOURCE", "FILE"].map(str::to_owned);
    output::table([titles].into_iter().chain(rows.iter().map(cells)).collect())
}
