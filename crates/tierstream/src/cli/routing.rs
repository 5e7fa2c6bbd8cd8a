//! Recorded routing, for `bench --routing`.

use std::path::Path;

use anyhow::ensure;
use tierstream::ggml::Replay;
use tierstream_eval::{Assume, Phase, Trace, read as read_trace};

/// Most tokens that are replayed.
const TOKENS_MAX: usize = 1 << 20;

/// Reads the decoded tokens of a trace, in any format.
pub(crate) fn read(path: &Path) -> anyhow::Result<Replay> {
    let trace = read_trace(path, Assume::default())?;
    let decoded = trace.count(Phase::Decode);
    ensure!(decoded > 0, "{}: there are no decoded tokens in it", path.display());
    ensure!(decoded <= TOKENS_MAX, "{}: more than {TOKENS_MAX} tokens", path.display());
    Ok(replay(&trace))
}

fn replay(trace: &Trace) -> Replay {
    let layers = 0..trace.header().layers.len();
    let decoded = trace.tokens().iter().enumerate().filter(|(_, t)| t.phase == Phase::Decode);
    let of = |token, layer| -> Vec<u32> {
        trace.experts(token, layer).iter().map(|&expert| expert.into()).collect()
    };
    Replay::new(
        decoded.map(|(token, _)| layers.clone().map(|layer| of(token, layer)).collect()).collect(),
    )
}

#[cfg(test)]
mod tests {
    use tierstream::ggml::Replay;
    use tierstream_eval::{Header, NO_EXPERT, Phase, Token, Trace};

    use super::replay;

    #[test]
    fn decoded_tokens_in_order() {
        let mut trace = Trace::new(Header::uniform(2, 10, 2)).unwrap();
        let token = |position, phase| Token {
            prompt: 0,
            position,
            batch: position,
            id: None,
            phase,
            domain: 0,
        };
        trace.push(token(0, Phase::Prefill), &[9, 8, 0, 1], &[]).unwrap();
        trace.push(token(1, Phase::Decode), &[7, 3, 1, NO_EXPERT], &[]).unwrap();
        trace.push(token(2, Phase::Decode), &[2, 0, 5, 4], &[]).unwrap();
        let expected = Replay::new(vec![vec![vec![7, 3], vec![1]], vec![vec![2, 0], vec![5, 4]]]);
        assert_eq!(replay(&trace), expected);
    }
}
