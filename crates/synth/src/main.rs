//! `tierstream-synth`: writes a random-weight GGUF model.

#![forbid(unsafe_code)]

use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Parser;
use tierstream_synth::{Arch, Quant, Spec, TensorType, Written, parse_size};

/// Models asked for by size start from large shapes from here on.
const BIG_BYTES: u64 = 128 << 20;

/// Write a random-weight GGUF model that loads and decodes in llama.cpp.
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    /// qwen3moe, olmoe, gpt-oss, deepseek2, llama4, mixtral, hy_v3 (fused gate and up) or llama
    /// (dense).
    arch: Arch,
    /// Where to write; split files get -00001-of-0000N before the extension.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Start from large shapes (expert records of 1 to 3 MB).
    #[arg(long)]
    big: bool,
    /// Number of layers.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=512))]
    layers: Option<u32>,
    /// Routed experts per MoE layer.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    experts: Option<u32>,
    /// Routed experts per token.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    used: Option<u32>,
    /// Width of the model.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(32..=65536))]
    embd: Option<u32>,
    /// Hidden width of an expert, or of the layers of a dense model.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1048576))]
    ff: Option<u32>,
    /// Tokens in the vocabulary.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=16777216))]
    vocab: Option<u32>,
    /// Type of the experts: f32, f16, bf16, q8_0, q4_0, q5_0, q4_k, q5_k, q6_k, mxfp4, or q4_k_m
    /// for Q4_K with some Q6_K.
    #[arg(long = "type", value_name = "TYPE")]
    quant: Option<Quant>,
    /// Type of all other matrices.
    #[arg(long, value_name = "TYPE")]
    dense_type: Option<TensorType>,
    /// Keep gate and up of an expert in one tensor (deepseek2; hy_v3 always does).
    #[arg(long)]
    fused: bool,
    /// Choose layers and experts to reach about this size, such as 1GiB.
    #[arg(long, value_name = "SIZE", value_parser = parse_size, conflicts_with_all = ["layers", "experts"])]
    size: Option<u64>,
    /// Split into files of at most this much tensor data, such as 200MB.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    split: Option<u64>,
    /// With --split: no tensors in the first file.
    #[arg(long, requires = "split")]
    split_empty_first: bool,
    /// Seed of all weights.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Alignment of tensors within the file, in bytes.
    #[arg(long, value_name = "N")]
    align: Option<u32>,
}

impl Cli {
    fn spec(&self) -> Spec {
        let big = self.big || self.size.is_some_and(|s| s >= BIG_BYTES);
        let mut spec = if big { Spec::big(self.arch) } else { Spec::new(self.arch) };
        if let Some(n) = self.embd {
            spec = spec.width(n);
        }
        if let Some(quant) = self.quant {
            spec = spec.quant(quant);
        }
        let n_expert = self.experts.unwrap_or(spec.n_expert);
        let n_used = self.used.unwrap_or(spec.n_used.min(n_expert));
        spec = spec.experts(n_expert, n_used);
        if let Some(n) = self.ff {
            *(if self.arch.is_moe() { &mut spec.n_ff_exp } else { &mut spec.n_ff }) = n;
        }
        spec.n_layer = self.layers.unwrap_or(spec.n_layer);
        spec.vocab = self.vocab.unwrap_or(spec.vocab);
        spec.dense_type = self.dense_type.unwrap_or(spec.dense_type);
        spec.alignment = self.align.unwrap_or(spec.alignment);
        spec.fused_gate_up |= self.fused;
        spec.split_bytes = self.split;
        spec.split_empty_first = self.split_empty_first;
        spec.seed = self.seed;
        match self.size {
            Some(bytes) => spec.scale_to(bytes),
            None => spec,
        }
    }
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    let spec = cli.spec();
    let written = spec.write(&cli.out).context("no model written")?;
    report(&spec, &written).context("cannot print the report")
}

fn report(spec: &Spec, written: &Written) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    for file in &written.files {
        writeln!(out, "{}", file.display())?;
    }
    let (files, bytes) = (written.files.len(), written.bytes);
    writeln!(
        out,
        "{}: {} layers, width {}, {files} file(s), {bytes} bytes",
        spec.arch, spec.n_layer, spec.n_embd
    )?;
    let records = spec.plan().records();
    let sizes = records.iter().map(|(_, bytes)| *bytes);
    if let (Some(least), Some(most)) = (sizes.clone().min(), sizes.max()) {
        writeln!(
            out,
            "experts: {} MoE layers x {}, {} per token, records of {least} to {most} bytes, {} bytes in all",
            records.len(),
            spec.n_expert,
            spec.n_used,
            written.expert_bytes,
        )?;
    }
    Ok(())
}
