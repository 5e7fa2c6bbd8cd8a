//! Recorded routing, for `bench --routing`: the `route_trace v1` CSV of public traces.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use anyhow::{Context, bail, ensure};
use tierstream::ggml::Replay;

/// The columns that are used: which token, whether it was decoded, and one expert of a layer.
const COLUMNS: [&str; 5] = ["turn", "phase", "step", "layer", "expert"];

/// `phase` of tokens that were decoded one by one.
const DECODED: u32 = 1;

/// Most tokens of a trace.
const TOKENS_MAX: usize = 1 << 20;

/// Reads the decoded tokens of a trace.
pub(crate) fn read(path: &Path) -> anyhow::Result<Replay> {
    let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    parse(BufReader::new(file)).with_context(|| format!("{}: no trace", path.display()))
}

fn parse(text: impl BufRead) -> anyhow::Result<Replay> {
    let mut columns: Option<[usize; 5]> = None;
    let mut tokens: BTreeMap<(u32, u32), BTreeMap<u32, Vec<u32>>> = BTreeMap::new();
    for (number, line) in text.lines().enumerate() {
        let line = line?;
        if line.starts_with('#') || line.trim().is_empty() {
            continue;
        }
        let fields: Vec<&str> = line.split(',').collect();
        let Some(at) = columns else {
            let place = |name: &&str| fields.iter().position(|field| field == name);
            let found: Vec<usize> = COLUMNS.iter().filter_map(place).collect();
            let Ok(found) = <[usize; 5]>::try_from(found) else {
                bail!("line {}: no columns {}", number + 1, COLUMNS.join(", "));
            };
            columns = Some(found);
            continue;
        };
        let value = |column: usize| fields.get(at[column]).and_then(|f| f.trim().parse().ok());
        let row: Option<Vec<u32>> = (0..COLUMNS.len()).map(value).collect();
        let Some([turn, phase, step, layer, expert]) = row.as_deref().and_then(|r| r.first_chunk())
        else {
            bail!("line {}: {line:?}", number + 1);
        };
        if *phase == DECODED {
            let layers = tokens.entry((*turn, *step)).or_default();
            layers.entry(*layer).or_default().push(*expert);
        }
        ensure!(tokens.len() <= TOKENS_MAX, "more than {TOKENS_MAX} tokens");
    }
    ensure!(!tokens.is_empty(), "there are no decoded tokens in it");
    let layers = |token: BTreeMap<u32, Vec<u32>>| token.into_values().collect();
    Ok(Replay::new(tokens.into_values().map(layers).collect()))
}

#[cfg(test)]
mod tests {
    use super::{Replay, parse};

    const HEAD: &str =
        "# route_trace v1\nturn,phase,step,layer,slot,expert,weight,residency,expert_bytes\n";

    #[test]
    fn decoded_tokens_in_order() {
        let rows = "0,0,0,0,0,9,0.5,0,1\n0,1,5,0,0,7,0.5,0,1\n0,1,5,0,1,3,0.4,0,1\n\
                    0,1,5,2,0,1,1,0,1\n1,1,0,0,0,2,1,0,1\n";
        let replay = parse(format!("{HEAD}{rows}").as_bytes()).unwrap();
        assert_eq!(replay, Replay::new(vec![vec![vec![7, 3], vec![1]], vec![vec![2]]]));
    }

    #[test]
    fn what_is_no_trace_is_told_with_its_line() {
        for (text, told) in [
            (String::new(), "no decoded tokens"),
            ("a,b\n".to_owned(), "line 1: no columns"),
            (format!("{HEAD}0,1,0,0,0,x,1,0,1\n"), "line 3"),
            (format!("{HEAD}0,1\n"), "line 3"),
            (format!("{HEAD}0,0,0,0,0,9,0.5,0,1\n"), "no decoded tokens"),
        ] {
            let error = parse(text.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(told), "{error}");
        }
    }
}
