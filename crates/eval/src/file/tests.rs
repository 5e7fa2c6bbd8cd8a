use std::fs::File;
use std::io::Write;

use super::{Writer, read};
use crate::header::{Header, Layer, Model, Sampling};
use crate::trace::{NO_EXPERT, Phase, Token, Trace};

fn header() -> Header {
    let layer = |block, experts, used| Layer { block, experts, used, record_bytes: 1 << 20 };
    Header {
        model: Model {
            name: "a model".to_owned(),
            hash: Some("xxh3:01".to_owned()),
            architecture: Some("olmoe".to_owned()),
        },
        layers: vec![layer(1, 8, 2), layer(3, 1000, 3)],
        ranked: true,
        sampling: Some(Sampling { temperature: Some(0.5), seed: Some(7), ..Sampling::default() }),
        source: String::new(),
    }
}

fn token(position: u32) -> Token {
    let phase = if position < 2 { Phase::Prefill } else { Phase::Decode };
    let id = (position != 3).then_some(u32::MAX - position);
    Token { prompt: u32::MAX, position, batch: position.max(1), id, phase, domain: 0 }
}

fn written(trace: &Trace) -> File {
    let mut file = tempfile::tempfile().unwrap();
    let mut writer = Writer::new(file.try_clone().unwrap(), trace.header().clone()).unwrap();
    for name in trace.domains().names() {
        writer.domain(name).unwrap();
    }
    for (index, token) in trace.tokens().iter().enumerate() {
        writer.push(token, trace.row(index), trace.weight_row(index)).unwrap();
    }
    assert_eq!(writer.tokens(), trace.len() as u64);
    writer.finish().unwrap().flush().unwrap();
    file.flush().unwrap();
    file
}

fn sample(tokens: u32) -> Trace {
    let mut trace = Trace::new(header()).unwrap();
    let code = trace.domains_mut().number("code").unwrap();
    for position in 0..tokens {
        let expert = (position % 7) as u16;
        let row = match position % 3 {
            0 => [expert, 7, 999, 0, 5],
            1 => [expert, NO_EXPERT, 3, 2, NO_EXPERT],
            _ => [NO_EXPERT, NO_EXPERT, 5, 6, 7],
        };
        let domain = if position % 2 == 0 { code } else { 0 };
        trace.push(Token { domain, ..token(position) }, &row, &[]).unwrap();
    }
    trace
}

#[test]
fn what_is_written_is_read() {
    let trace = sample(10);
    assert_eq!(read(written(&trace)).unwrap(), trace);
    let empty = Trace::new(header()).unwrap();
    assert_eq!(read(written(&empty)).unwrap(), empty);
}

#[test]
fn weights_are_kept_where_there_are_any() {
    let mut trace = Trace::new(header()).unwrap();
    trace.push(token(0), &[0, 1, 2, 3, 4], &[]).unwrap();
    trace.push(token(1), &[0, 1, 2, 3, NO_EXPERT], &[0.1, 0.2, 0.3, 0.4, f32::NAN]).unwrap();
    let back = read(written(&trace)).unwrap();
    assert_eq!(back.weights(1, 0), [0.1, 0.2]);
    assert_eq!(back.weights(1, 1), [0.3, 0.4]);
    assert!(back.weights(0, 0).iter().all(|weight| weight.is_nan()));
}

#[test]
fn a_long_trace_has_several_row_groups() {
    let trace = sample(150_000);
    let file = written(&trace);
    let groups = parquet::file::reader::FileReader::num_row_groups(
        &parquet::file::reader::SerializedFileReader::new(file.try_clone().unwrap()).unwrap(),
    );
    assert!(groups > 1, "{groups}");
    assert_eq!(read(file).unwrap(), trace);
}

#[test]
fn cut_and_changed_files_are_refused_or_read_as_something() {
    let trace = sample(40);
    let mut file = written(&trace);
    let mut bytes = Vec::new();
    std::io::Seek::rewind(&mut file).unwrap();
    std::io::Read::read_to_end(&mut file, &mut bytes).unwrap();
    let try_read = |bytes: &[u8]| {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        read(file)
    };
    for len in (0..bytes.len()).step_by(13) {
        assert!(try_read(&bytes[..len]).is_err(), "{len} of {} bytes", bytes.len());
    }
    for (at, flip) in (0..bytes.len()).flat_map(|at| [1, 0x5a, 0xff].map(|flip| (at, flip))) {
        let mut changed = bytes.clone();
        changed[at] ^= flip;
        if let Err(error) = try_read(&changed) {
            let text = error.to_string();
            assert!(!text.is_empty() && !text.contains('\n'), "{text:?}");
        }
    }
}
