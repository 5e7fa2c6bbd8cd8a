//! Writing traces in formats that others read.

use std::io::{self, Write};

use serde::Serialize;

use crate::header::Header;
use crate::trace::{Phase, Trace};

/// Writes JSON lines: the header, and a line for each token. Without the first line (`tail -n +2`) it
/// is the format of sqliteai/waste, which has `tok` and `layers` alone.
///
/// # Errors
///
/// If `out` takes it not.
pub fn write_jsonl(trace: &Trace, mut out: impl Write) -> io::Result<()> {
    #[derive(Serialize)]
    struct Head<'a> {
        header: &'a Header,
    }
    #[derive(Serialize)]
    struct Line<'a> {
        tok: u32,
        layers: Vec<&'a [u16]>,
        #[serde(skip_serializing_if = "Vec::is_empty")]
        weights: Vec<Vec<Option<f32>>>,
        prompt: u32,
        position: u32,
        batch: u32,
        #[serde(skip_serializing_if = "Option::is_none")]
        id: Option<u32>,
        phase: &'static str,
        #[serde(skip_serializing_if = "str::is_empty")]
        domain: &'a str,
    }
    let layers = 0..trace.header().layers.len();
    serde_json::to_writer(&mut out, &Head { header: trace.header() })?;
    writeln!(out)?;
    for (index, token) in trace.tokens().iter().enumerate() {
        let known = trace.weight_row(index).iter().any(|weight| !weight.is_nan());
        let of = |layer| {
            let weights = trace.weights(index, layer).iter();
            weights.map(|&weight| (!weight.is_nan()).then_some(weight)).collect()
        };
        let line = Line {
            tok: index as u32,
            layers: layers.clone().map(|layer| trace.experts(index, layer)).collect(),
            weights: if known { layers.clone().map(of).collect() } else { Vec::new() },
            prompt: token.prompt,
            position: token.position,
            batch: token.batch,
            id: token.id,
            phase: token.phase.name(),
            domain: &trace.domains().names()[usize::from(token.domain)],
        };
        serde_json::to_writer(&mut out, &line)?;
        writeln!(out)?;
    }
    out.flush()
}

/// Writes a `route_trace v1` CSV (BigMoeOnEdge, `docs/telemetry.md`). It has one number of experts for
/// all layers, no token ids, domains or batches. `residency` and `expert_bytes` are those of a run without a
/// cache: every routed expert is read.
///
/// # Errors
///
/// If `out` takes it not, or layers differ in their experts.
pub fn write_route_csv(trace: &Trace, mut out: impl Write) -> io::Result<()> {
    let Header { model, layers, .. } = trace.header();
    let (experts, used) = (layers[0].experts, layers[0].used);
    if layers.iter().any(|layer| (layer.experts, layer.used) != (experts, used)) {
        let reason = "route_trace v1 has one number of experts for all layers; write JSON lines";
        return Err(io::Error::new(io::ErrorKind::InvalidInput, reason));
    }
    let line = |text: &str| text.replace(['\n', '\r'], " ");
    writeln!(out, "# route_trace v1")?;
    writeln!(
        out,
        "# model={} arch={} n_layer={} n_expert={experts} n_expert_used={used}",
        line(&model.name),
        line(model.architecture.as_deref().unwrap_or("unknown")).replace(' ', "_"),
        layers.iter().map(|layer| layer.block + 1).max().unwrap_or(0),
    )?;
    for layer in layers {
        writeln!(out, "# layer={} expert_bytes={} dense_bytes=0", layer.block, layer.record_bytes)?;
    }
    writeln!(out, "turn,phase,step,layer,slot,expert,weight,residency,expert_bytes")?;
    for (index, token) in trace.tokens().iter().enumerate() {
        let phase = u32::from(token.phase == Phase::Decode);
        for (number, layer) in layers.iter().enumerate() {
            let weights = trace.weights(index, number);
            for (slot, expert) in trace.experts(index, number).iter().enumerate() {
                let weight = match weights.get(slot) {
                    Some(weight) if !weight.is_nan() => weight.to_string(),
                    _ => "nan".to_owned(),
                };
                writeln!(
                    out,
                    "{},{phase},{},{},{slot},{expert},{weight},0,{}",
                    token.prompt, token.position, layer.block, layer.record_bytes
                )?;
            }
        }
    }
    out.flush()
}
