//! `tierstream show`: what is in a model and what a budget would hold of it. Reads headers only.

use std::collections::BTreeMap;
use std::fmt;
use std::process::ExitCode;

use serde::Serialize;
use tierstream::gguf::experts::MoeLayer;
use tierstream::gguf::{Experts, Model, Original};
use tierstream::size::{Bytes, PoolShare};
use tierstream::{DEFAULT_CTX, Engine, Error, Forecast, Options, Packing, PoolSize, Requirement};

use super::args::{Cli, Show};
use super::open;
use super::output;
use super::report::lines;

/// What the budget table and the estimates are asked for.
#[derive(Debug, Default)]
pub(crate) struct Asked {
    ctx: Option<u32>,
    ram: Option<u64>,
    experts: Option<PoolShare>,
}

impl Asked {
    /// Nothing but a length of context, tokens.
    pub(crate) fn of_context(n_ctx: usize) -> Self {
        Self { ctx: u32::try_from(n_ctx).ok(), ..Self::default() }
    }
}

/// What a model was found to need of memory.
#[derive(Clone, Copy)]
pub(crate) struct Memory<'a> {
    model: &'a tierstream::Model,
    requirement: &'a Requirement,
}

impl<'a> From<&'a Forecast> for Memory<'a> {
    fn from(forecast: &'a Forecast) -> Self {
        Self { model: forecast.model(), requirement: forecast.requirement() }
    }
}

impl<'a> From<&'a Engine> for Memory<'a> {
    fn from(engine: &'a Engine) -> Self {
        Self { model: engine.model(), requirement: engine.requirement() }
    }
}

/// The answer of `show`; `docs/json.md` tells what the fields are.
#[derive(Debug, Serialize)]
pub(crate) struct Info {
    model: String,
    name: Option<String>,
    architecture: String,
    files: usize,
    file_bytes: u64,
    layers: Option<u32>,
    moe_layers: usize,
    experts: u32,
    experts_used: u32,
    record_bytes: Vec<u64>,
    token_cycle_bytes: u64,
    expert_bytes: u64,
    dense_bytes: u64,
    expert_types: BTreeMap<&'static str, u64>,
    dense_types: BTreeMap<&'static str, u64>,
    context_trained: Option<u32>,
    tokenizer: Option<String>,
    tokens: usize,
    chat_template: bool,
    context: u32,
    kv_bytes_estimate: Option<u64>,
    pool_bytes_min: u64,
    ram_bytes_min_estimate: Option<u64>,
    budgets: Vec<Budget>,
    packed: Option<PackedOf>,
    packing: Option<Packing>,
    llama_cpp_refuses: Option<String>,
}

/// What a packed model was made of.
#[derive(Debug, Serialize)]
struct PackedOf {
    originals: Vec<String>,
    experts_only: bool,
}

impl PackedOf {
    fn of(file: &Model) -> Option<Self> {
        let name = |original: &Original| output::printable(&original.name.display().to_string());
        let originals = file.originals()?.iter().map(name).collect();
        Some(Self { originals, experts_only: file.files().len() > 1 })
    }
}

/// What one size of the expert pool would hold.
#[derive(Debug, Serialize)]
struct Budget {
    asked: String,
    pool_bytes: u64,
    experts_percent: f64,
    rho: f64,
    ram_bytes_estimate: Option<u64>,
    enough: bool,
}

pub(crate) fn show(cli: &Cli, args: &Show) -> anyhow::Result<ExitCode> {
    let path = open::path(&args.model.load)?;
    let file = tierstream::pack::open(&path).map_err(Error::from)?;
    let asked = Asked {
        ctx: args.model.load.engine.ctx,
        ram: args.model.load.engine.ram.map(|b| b.0),
        experts: args.model.experts,
    };
    let options = open::options(&args.model.load.engine, args.model.experts)?;
    if args.model.load.engine.verify_weights {
        output::note("--verify-weights has no effect: `show` reads no weights");
    }
    let forecast = file.check_ggml().is_ok().then(|| forecast(&file, options)).flatten();
    let info = Info::new(&file, &asked, forecast.as_ref().map(Memory::from))?;
    if cli.json {
        output::json(&info)?;
    } else {
        output::print(&info.to_string())?;
    }
    if args.model.load.engine.machine.gpu.0.is_some() {
        output::note("what is told here is of host memory: with --gpu much of it is the GPU's");
    }
    if let Some(why) = &info.llama_cpp_refuses {
        output::note(format!("`run` will refuse this file: {why}"));
    }
    Ok(ExitCode::SUCCESS)
}

/// What the model would take of memory; a note if llama.cpp does not make it.
fn forecast(file: &Model, options: Options) -> Option<Forecast> {
    let forecast = Forecast::new(file, options);
    forecast.inspect_err(|e| output::note(format!("what memory it takes is not known: {e}"))).ok()
}

impl Info {
    /// Of `file`, and of what it needs of memory, where that is known.
    pub(crate) fn new(
        file: &Model,
        asked: &Asked,
        memory: Option<Memory<'_>>,
    ) -> tierstream::Result<Info> {
        let experts = Experts::group(file)?;
        let context_trained = file.arch_u32("context_length")?;
        let context = asked.ctx.unwrap_or_else(|| {
            context_trained.filter(|&n| n > 0).map_or(DEFAULT_CTX, |n| n.min(DEFAULT_CTX))
        });
        let kv = memory.map(|m| m.requirement.state_bytes).filter(|&bytes| bytes > 0);
        let (expert_types, dense_types) = types(file, &experts);
        let most = |of: fn(&MoeLayer) -> u32| experts.layers().iter().map(of).max().unwrap_or(0);
        let metadata = file.metadata();
        let text = |key| metadata.str(key).ok().flatten().map(output::printable);
        Ok(Info {
            model: file.files()[0].path.display().to_string(),
            name: text("general.name"),
            architecture: output::printable(file.architecture()),
            files: file.files().len(),
            file_bytes: file.file_bytes(),
            layers: file.block_count()?,
            moe_layers: experts.layers().len(),
            experts: most(|l| l.experts),
            experts_used: most(|l| l.used),
            record_bytes: experts.size_classes().iter().map(|c| c.record_bytes).collect(),
            token_cycle_bytes: experts.token_cycle_bytes(),
            expert_bytes: experts.expert_bytes(),
            dense_bytes: experts.dense_bytes(),
            expert_types,
            dense_types,
            context_trained,
            tokenizer: open::tokenizer(file),
            tokens: metadata.strings("tokenizer.ggml.tokens").ok().flatten().map_or(0, |t| t.len()),
            chat_template: metadata.get("tokenizer.chat_template").is_some(),
            context,
            kv_bytes_estimate: kv,
            pool_bytes_min: memory
                .map_or_else(|| pool_bytes_min(&experts), |m| m.model.least_pool_bytes()),
            ram_bytes_min_estimate: memory.map(|m| m.requirement.least_bytes()),
            budgets: Table { experts: &experts, memory }.rows(asked),
            packed: PackedOf::of(file),
            packing: Packing::of(file)?,
            llama_cpp_refuses: file.check_ggml().err().map(|e| e.to_string()),
        })
    }
}

/// The records that one token uses, in every layer that streams.
fn pool_bytes_min(experts: &Experts) -> u64 {
    let layers = experts.layers().iter().filter(|l| l.is_streamed());
    layers.map(|l| u64::from(l.used) * l.record_bytes).sum()
}

/// Bytes per type of the experts and of everything else.
fn types(
    file: &Model,
    experts: &Experts,
) -> (BTreeMap<&'static str, u64>, BTreeMap<&'static str, u64>) {
    let mut of_experts = vec![false; file.tensors().len()];
    for part in experts.layers().iter().flat_map(|l| &l.parts) {
        of_experts[part.tensor] = true;
    }
    let (mut routed, mut dense) = (BTreeMap::new(), BTreeMap::new());
    for (tensor, of_experts) in file.tensors().iter().zip(of_experts) {
        let types = if of_experts { &mut routed } else { &mut dense };
        *types.entry(tensor.ty.name()).or_default() += tensor.len;
    }
    (routed, dense)
}

/// What is asked of a budget table: the file's experts, and the model with what it needs, unless
/// llama.cpp refuses it.
struct Table<'a> {
    experts: &'a Experts,
    memory: Option<Memory<'a>>,
}

impl Table<'_> {
    fn rows(&self, asked: &Asked) -> Vec<Budget> {
        if self.experts.is_empty() {
            return Vec::new();
        }
        let mut rows: Vec<Budget> =
            [0.25, 0.5, 0.75, 1.0].map(|s| self.share(PoolShare::Share(s).to_string(), s)).into();
        match asked.experts {
            Some(asked @ PoolShare::Share(s)) => {
                rows.push(self.share(format!("--experts {asked}"), s));
            }
            Some(asked @ PoolShare::Bytes(bytes)) => {
                let size = PoolSize::Bytes(bytes.0);
                rows.push(self.row(format!("--experts {asked}"), bytes.0, size));
            }
            None => {}
        }
        if let (Some(ram), Some(memory)) = (asked.ram, &self.memory) {
            let left = ram.saturating_sub(memory.requirement.fixed_bytes);
            let size = PoolSize::Bytes(left);
            // Where it is too small, what there would be.
            let pool = memory.model.pool_bytes_of(size).unwrap_or(left);
            rows.push(self.row(format!("--ram {}", Bytes(ram)), pool, size));
        }
        rows
    }

    fn share(&self, asked: String, share: f64) -> Budget {
        let bytes = (self.experts.expert_bytes() as f64 * share).round() as u64;
        self.row(asked, bytes, PoolSize::Share(share))
    }

    /// A pool of `bytes`, which `run` makes when `size` is asked for.
    fn row(&self, asked: String, bytes: u64, size: PoolSize) -> Budget {
        let all = self.experts.expert_bytes();
        let pool_bytes = bytes.min(all);
        // Slots are a little larger than records. An error: fewer than a token needs.
        let slots = self.memory.as_ref().map(|memory| memory.model.pool_bytes_of(size));
        let ram_bytes_estimate = self.memory.as_ref().zip(slots.as_ref()).map(|(memory, slots)| {
            memory.requirement.fixed_bytes + *slots.as_ref().unwrap_or(&pool_bytes)
        });
        Budget {
            asked,
            pool_bytes,
            experts_percent: 100.0 * pool_bytes as f64 / all as f64,
            rho: pool_bytes as f64 / self.experts.token_cycle_bytes().max(1) as f64,
            ram_bytes_estimate,
            enough: slots.map_or(pool_bytes >= pool_bytes_min(self.experts), |s| s.is_ok()),
        }
    }
}

impl fmt::Display for Info {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let or_unknown = |n: Option<u32>| n.map_or("not in the file".to_owned(), |n| n.to_string());
        let mut rows = vec![("model", output::printable(&self.model))];
        rows.extend(self.name.clone().map(|name| ("name", name)));
        let files = match self.files {
            1 => String::new(),
            n => format!(" in {n} files"),
        };
        rows.extend([
            ("architecture", self.architecture.clone()),
            ("size", format!("{}{files}", Bytes(self.file_bytes))),
            ("layers", or_unknown(self.layers)),
        ]);
        rows.extend(self.packed.as_ref().map(|packed| ("packed", packed.to_string())));
        rows.extend(self.expert_rows());
        let kv = self.kv_bytes_estimate.map_or("not known from the file".to_owned(), |bytes| {
            format!("about {} for {} tokens", Bytes(bytes), self.context)
        });
        let tokenizer = match &self.tokenizer {
            Some(kind) => format!("{kind}, {} tokens", self.tokens),
            None => "none: it takes token ids (--prompt-tokens)".to_owned(),
        };
        let template = if self.chat_template { "yes" } else { "no" };
        rows.extend([
            ("dense weights", types_text(self.dense_bytes, &self.dense_types)),
            ("context trained", or_unknown(self.context_trained)),
            ("KV cache", kv),
            ("tokenizer", tokenizer),
            ("chat template", template.to_owned()),
        ]);
        if self.moe_layers == 0 {
            rows.extend(
                self.ram_bytes_min_estimate.map(|n| ("memory in all", Bytes(n).to_string())),
            );
        }
        f.write_str(&lines(&rows))?;
        if self.budgets.is_empty() { Ok(()) } else { self.fmt_budgets(f) }
    }
}

impl Info {
    fn expert_rows(&self) -> Vec<(&'static str, String)> {
        if self.moe_layers == 0 {
            let why = "none: this model is dense and does not stream";
            return vec![("experts", why.to_owned())];
        }
        let records: Vec<String> =
            self.record_bytes.iter().map(|&b| Bytes(b).to_string()).collect();
        let mut rows = vec![
            ("MoE layers", self.moe_layers.to_string()),
            (
                "experts",
                format!("{} in a layer, {} used by a token", self.experts, self.experts_used),
            ),
            ("expert weights", types_text(self.expert_bytes, &self.expert_types)),
            ("expert record", records.join(", ")),
            (
                "token cycle",
                format!("{} of expert records for a token", Bytes(self.token_cycle_bytes)),
            ),
        ];
        rows.extend(self.packing.as_ref().map(|gain| ("packing", packing_text(gain))));
        rows
    }

    fn fmt_budgets(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.budgets.iter().map(|b| b.asked.len()).max().unwrap_or(0).max(7);
        writeln!(f)?;
        writeln!(f, "What a budget holds; memory in all is an estimate.")?;
        let head = ["expert pool", "share", "token cycles", "memory in all"];
        writeln!(
            f,
            "{:width$}  {:>11}  {:>7}  {:>12}  {:>13}",
            "", head[0], head[1], head[2], head[3]
        )?;
        for b in &self.budgets {
            let ram = b.ram_bytes_estimate.map_or("?".to_owned(), |n| Bytes(n).to_string());
            writeln!(
                f,
                "{:width$}  {:>11}  {:>5.1} %  {:>12.2}  {ram:>13}{}",
                b.asked,
                Bytes(b.pool_bytes).to_string(),
                b.experts_percent,
                b.rho,
                if b.enough { "" } else { "  too small" }
            )?;
        }
        let least = Bytes(self.pool_bytes_min);
        writeln!(f, "The smallest pool that works: {least}, the records that one token uses.")?;
        if let Some(least) = self.ram_bytes_min_estimate {
            writeln!(f, "The smallest --ram that works: about {}.", Bytes(least))?;
        }
        let whole = self.budgets.iter().find(|b| b.experts_percent >= 100.0);
        match whole.and_then(|whole| whole.ram_bytes_estimate) {
            Some(bytes) => writeln!(f, "From about {} on, nothing has to stream.", Bytes(bytes)),
            None => Ok(()),
        }
    }
}

impl fmt::Display for PackedOf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = self.originals.join(", ");
        match self.experts_only {
            true => write!(f, "the experts; all else is in {names}"),
            false => write!(f, "made of {names}"),
        }
    }
}

fn packing_text(gain: &Packing) -> String {
    let extra = match gain.extra_bytes {
        bytes @ 0.. => format!("{} more", Bytes(bytes.unsigned_abs())),
        bytes => format!("{} less", Bytes(bytes.unsigned_abs())),
    };
    format!(
        "a record would be 1 read, not {:.1}; the packed file takes {}, {extra} than the model",
        gain.reads_per_record,
        Bytes(gain.file_bytes)
    )
}

/// `15.19 MiB (Q4_0)`, or with the share of each type where there are several.
fn types_text(all: u64, types: &BTreeMap<&'static str, u64>) -> String {
    let each: Vec<String> = match types.len() {
        0 | 1 => types.keys().map(|name| (*name).to_owned()).collect(),
        _ => types.iter().map(|(name, &bytes)| format!("{name} {}", Bytes(bytes))).collect(),
    };
    format!("{} ({})", Bytes(all), each.join(", "))
}
