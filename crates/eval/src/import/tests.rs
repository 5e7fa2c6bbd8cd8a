use std::fs;
use std::path::{Path, PathBuf};

use proptest::prelude::*;

use super::{Assume, Format, natural, read};
use crate::error::Error;
use crate::export::{write_jsonl, write_route_csv};
use crate::header::{Header, Layer, Model};
use crate::trace::{NO_EXPERT, Phase, Token, Trace};

const ROUTE: &str =
    "# route_trace v1\nturn,phase,step,layer,slot,expert,weight,residency,expert_bytes\n";

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

fn file(dir: &tempfile::TempDir, name: &str, text: impl AsRef<[u8]>) -> PathBuf {
    let path = dir.path().join(name);
    fs::write(&path, text).unwrap();
    path
}

fn of(text: &str) -> Result<Trace, Error> {
    let dir = folder();
    read(&file(&dir, "trace", text), Assume::default())
}

fn told(text: &str) -> String {
    of(text).unwrap_err().to_string()
}

#[test]
fn route_csv() {
    let trace = of(&format!(
        "# route_trace v1\n# model=/a b/m.gguf arch=olmoe n_layer=3 n_expert=16 n_expert_used=2\n\
         # layer=0 expert_bytes=0 dense_bytes=7\n# layer=1 expert_bytes=100 dense_bytes=7\n\
         # layer=2 expert_bytes=200 dense_bytes=7\n{}\
         0,1,5,1,1,3,0.4,0,1\n0,1,5,1,0,7,0.5,0,1\n0,1,5,2,0,1,nan,0,1\n\
         0,0,1,1,0,9,0.5,0,1\n0,0,2,1,0,9,0.5,0,1\n1,1,0,1,0,2,1,0,1\n",
        ROUTE.lines().nth(1).unwrap().to_owned() + "\n"
    ))
    .unwrap();
    let header = trace.header();
    assert_eq!(header.model.name, "/a b/m.gguf");
    assert_eq!(header.model.architecture.as_deref(), Some("olmoe"));
    let layer = |block, record_bytes| Layer { block, experts: 16, used: 2, record_bytes };
    assert_eq!(header.layers, [layer(1, 100), layer(2, 200)]);
    assert_eq!(header.token_bytes(), 600);
    let tokens = trace.tokens();
    let batches: Vec<_> = tokens.iter().map(|t| (t.batch, t.phase, t.position)).collect();
    let (prefill, decode) = (Phase::Prefill, Phase::Decode);
    assert_eq!(batches, [(0, prefill, 1), (0, prefill, 2), (1, decode, 5), (2, decode, 0)]);
    assert_eq!(trace.experts(2, 0), [7, 3]);
    assert_eq!(trace.weights(2, 0), [0.5, 0.4]);
    assert_eq!(trace.experts(2, 1), [1]);
    assert!(trace.experts(3, 1).is_empty());
}

#[test]
fn damaged_route_csv_is_told_with_its_line() {
    for (text, told_) in [
        ("turn,phase,a\n".to_owned(), "line 1: no columns"),
        (format!("{ROUTE}0,1,0,0,0,x,1,0,1\n"), "line 3: no row"),
        (format!("{ROUTE}0,1\n"), "line 3"),
        (format!("{ROUTE}0,2,0,0,0,1,1,0,1\n"), "line 3"),
        (format!("{ROUTE}\n0,1,0,0,0,65535,1,0,1\n"), "line 4: no expert 65535"),
        (format!("{ROUTE}0,1,0,0,0,5,1,0,1\n0,1,0,0,1,5,1,0,1\n"), "line 4: layer 0 has expert 5"),
        (
            format!("# model=m arch=a n_expert=4 n_expert_used=1\n{ROUTE}0,1,0,0,0,4,1,0,1\n"),
            "no trace in a format",
        ),
        (
            format!(
                "# route_trace v1\n# model=m arch=a n_expert=4 n_expert_used=1\n{ROUTE}0,1,0,0,0,4,1,0,1\n"
            ),
            "line 5: no expert 4, there are 4",
        ),
        (ROUTE.to_owned(), "no MoE layer"),
        ("# route_trace v1\n".to_owned(), "there are no columns"),
    ] {
        let error = told(&text);
        assert!(error.contains(told_), "{error} for {told_}");
    }
}

#[test]
fn jsonl_of_others() {
    let trace = of(
        "{\"tok\": 1, \"layers\": [[1, 2], [5]]}\n\n{\"tok\": 2, \"layers\": [[2, 3], [0, 9]]}\n",
    );
    let trace = trace.unwrap();
    assert_eq!(trace.header().layers.len(), 2);
    assert_eq!(trace.header().layers[0], Layer { block: 0, experts: 10, used: 2, record_bytes: 0 });
    assert!(!trace.header().ranked);
    assert_eq!(trace.row(0), [1, 2, 5, NO_EXPERT]);
    assert_eq!(trace.tokens()[1].position, 2);
    let dir = folder();
    let path = file(&dir, "t.jsonl", "{\"tok\": 1, \"layers\": [[1, 2]]}");
    let more = read(&path, Assume { experts: Some(64) }).unwrap();
    assert_eq!(more.header().layers[0].experts, 64);
    let few = read(&path, Assume { experts: Some(2) }).unwrap_err().to_string();
    assert!(few.contains("expert 2 is used"), "{few}");
}

#[test]
fn damaged_jsonl_is_told_with_its_line() {
    let good = "{\"tok\":0,\"layers\":[[1,2]]}\n";
    let head = "{\"header\":{\"model\":{},\"layers\":[{\"block\":0,\"experts\":4,\"used\":2}]}}\n";
    for (text, told_) in [
        (format!("{good}{{\"tok\":1}}"), "line 2: missing field `layers`"),
        (format!("{good}{{"), "line 2: "),
        (format!("{good}{{\"layers\":[[1],[2]]}}"), "line 2: 2 layers instead of 1"),
        (format!("{good}{{\"layers\":[[1,1]]}}"), "line 2: MoE layer 0 has expert 1 twice"),
        (format!("{good}{{\"layers\":[[65535]]}}"), "line 2: no expert 65535"),
        (format!("{good}{{\"layers\":[[]]}}"), "line 2: no layer has an expert"),
        (format!("{good}{{\"layers\":[[-1]]}}"), "line 2"),
        (format!("{head}{{\"layers\":[[1,2,3]]}}"), "line 2: 3 experts in MoE layer 0"),
        (format!("{head}{{\"layers\":[[4]]}}"), "line 2: MoE layer 0 has no expert 4"),
        (format!("{head}{{\"layers\":[[1]],\"weights\":[[1,2]]}}"), "line 2: 2 weights of 1"),
        (format!("{head}{{\"layers\":[[1]],\"phase\":\"x\"}}"), "line 2: no phase: x"),
        ("{\"header\":{\"layers\":3}}\n".to_owned(), "line 1"),
        ("{\"layers\":[]}\n".to_owned(), "no MoE layer"),
    ] {
        let error = told(&text);
        assert!(error.contains(told_), "{error} for {told_}");
    }
}

#[test]
fn csv_of_prompts() {
    let dir = folder();
    let head = "Layer ID,Batch Number,Token,Activated Expert IDs\n";
    let a = "1,0,<s>,\"[8, 26]\"\n1,0,\",\",\"[3, 1]\"\n1,1,\"\"\"\",\"[2, 0]\"\n\
             2,0,<s>,\"[5, 6]\"\n2,0,\",\",\"[7, 1]\"\n2,1,\"\n\",\"[4, 9]\"\n";
    file(&dir, "prompt_10_data.csv", format!("{head}1,0,x,\"[1, 2]\"\n2,0,x,\"[3, 4]\"\n"));
    let one = file(&dir, "prompt_2_data.csv", format!("{head}{a}"));
    assert_eq!(Format::detect(&one).unwrap(), Format::PromptCsv);
    let trace = read(dir.path(), Assume::default()).unwrap();
    assert_eq!(trace.len(), 4);
    assert_eq!(trace.row(2), [2, 0, 4, 9]);
    assert_eq!(trace.header().layers[0], Layer { block: 1, experts: 27, used: 2, record_bytes: 0 });
    let phases: Vec<_> = trace.tokens().iter().map(|t| (t.prompt, t.batch, t.phase)).collect();
    let (prefill, decode) = (Phase::Prefill, Phase::Decode);
    assert_eq!(phases, [(0, 0, prefill), (0, 0, prefill), (0, 1, decode), (1, 2, prefill)]);
    for (text, told_) in [
        ("1,0,x,\"[1\"\n", "line 2: no list of experts"),
        ("1,0,x,\"[a]\"\n", "line 2: no expert a"),
        ("x,0,x,\"[1]\"\n", "line 2: no numbers"),
        ("1,0,x\n", "line 2: 3 columns instead of 4"),
        ("1,1,x,[1]\n1,0,x,[1]\n", "line 3: its batch"),
        ("1,0,x,[1]\n2,0,x,[1]\n2,0,x,[1]\n", "layer 2 has other tokens than layer 1"),
        ("1,0,x,\"[1, 1]\"\n", "token 0 of the prompt: MoE layer 0 has expert 1 twice"),
    ] {
        let error = told(&format!("{head}{text}"));
        assert!(error.contains(told_), "{error} for {told_}");
    }
}

/// A safetensors file with one tensor.
fn tensor(shape: [usize; 3], ids: &[u8]) -> Vec<u8> {
    let json = format!(
        "{{\"c4\":{{\"dtype\":\"I8\",\"shape\":{shape:?},\"data_offsets\":[0,{}]}}}}",
        ids.len()
    );
    let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(json.as_bytes());
    bytes.extend_from_slice(ids);
    bytes
}

#[test]
fn moe_lrc() {
    let dir = folder();
    file(&dir, "olmoe_01.safetensors", tensor([2, 2, 2], &[1, 2, 3, 4, 5, 6, 7, 8]));
    file(&dir, "olmoe_00.safetensors", tensor([2, 2, 2], &[9, 8, 7, 6, 5, 4, 3, 2]));
    let trace = read(dir.path(), Assume { experts: Some(64) }).unwrap();
    assert_eq!(trace.row(2), [5, 4, 5, 6]);
    assert_eq!((trace.tokens()[2].prompt, trace.tokens()[2].position), (1, 0));
    assert_eq!(trace.domains().names()[1], "c4");
    assert_eq!(trace.header().model.name, "olmoe");
    file(&dir, "olmoe_02.safetensors", tensor([1, 2, 2], &[1, 2, 3, 4]));
    let error = read(dir.path(), Assume::default()).unwrap_err().to_string();
    assert!(error.contains("olmoe_02.safetensors: its tensors are not"), "{error}");
    let ranks = folder();
    file(&ranks, "olmoe_00.safetensors", tensor([1, 2, 2], &[1, 0, 0, 1]));
    let error = read(ranks.path(), Assume::default()).unwrap_err().to_string();
    assert!(error.contains("ranks of all experts"), "{error}");
}

#[test]
fn what_is_no_trace_is_told() {
    let dir = folder();
    for (bytes, told) in [
        (&b""[..], "empty"),
        (b"hello\n", "no trace in a format"),
        (b"ARROW1\0\0", "an Arrow file"),
        (b"\xff\xff\xff\xff\x10\0\0\0", "an Arrow file"),
        (b"PAR1", "Parquet"),
        (b"PAR1\0\0\0\0PAR1", "Parquet"),
    ] {
        let path = file(&dir, "t", bytes);
        let error = read(&path, Assume::default()).unwrap_err();
        let text = error.to_string();
        assert!(text.starts_with(&path.display().to_string()), "{text}");
        assert!(text.contains(told) || told == "Parquet", "{text}");
    }
    let arrow = file(&dir, "t", b"ARROW1\0\0");
    assert!(Format::detect(&arrow).unwrap_err().hint().unwrap().contains("topk"));
    let missing = read(Path::new("/nowhere"), Assume::default()).unwrap_err().to_string();
    assert!(missing.starts_with("cannot read /nowhere"), "{missing}");
    let empty = read(folder().path(), Assume::default()).unwrap_err();
    assert!(empty.to_string().contains("No such file") || empty.hint().is_some());
}

#[test]
fn names_are_sorted_by_their_numbers() {
    let mut names = ["p_10.csv", "p_9.csv", "p_1_2.csv", "p_1.csv"];
    names.sort_by_cached_key(|name| natural(name));
    assert_eq!(names, ["p_1.csv", "p_1_2.csv", "p_9.csv", "p_10.csv"]);
}

/// Traces of any shape. Those of the CSV have one shape for all layers, batches as it counts them, and
/// neither ids nor domains.
fn traces(csv: bool) -> impl Strategy<Value = Trace> {
    let shape = (1u32..4, 2u32..40, any::<bool>()).prop_flat_map(|(layers, experts, weights)| {
        let used = prop::collection::vec(1..=experts.min(5), layers as usize);
        (Just(experts), used, Just(weights), prop::collection::vec(any::<u64>(), 0..12))
    });
    shape.prop_map(move |(experts, mut used, weights, tokens)| {
        if csv {
            let first = used[0];
            used.fill(first);
        }
        let layer = |(block, &used): (u32, _)| Layer { block, experts, used, record_bytes: 7 };
        let mut trace = Trace::new(Header {
            model: Model {
                name: "a model.gguf".to_owned(),
                hash: None,
                architecture: Some("olmoe".to_owned()),
            },
            layers: (0..).zip(&used).map(layer).collect(),
            ranked: true,
            sampling: None,
            source: if csv { "route_trace v1".to_owned() } else { String::new() },
        })
        .unwrap();
        let domain = if csv { 0 } else { trace.domains_mut().number("code").unwrap() };
        for (index, seed) in (0u32..).zip(tokens) {
            let id = (!csv && seed % 2 == 0).then_some(seed as u32);
            let token = Token {
                prompt: 3,
                position: index,
                batch: index,
                id,
                phase: Phase::Decode,
                domain,
            };
            let (mut row, mut values) = (Vec::new(), Vec::new());
            for (layer, &used) in (0u64..).zip(&used) {
                let first = (seed >> (8 * layer)) as u32 % experts;
                let known = if layer > 0 && seed % 5 == 0 { used - 1 } else { used };
                let ids = (0..known).map(|n| ((first + n) % experts) as u16);
                row.extend(ids.chain((known..used).map(|_| NO_EXPERT)));
                values.extend((0..used).map(|n| if n < known { 0.25 } else { f32::NAN }));
            }
            trace.push(token, &row, if weights { &values } else { &[] }).unwrap();
        }
        trace
    })
}

/// NaN is as good as NaN.
fn same(a: &Trace, b: &Trace) {
    assert_eq!(a.header(), b.header());
    assert_eq!(a.tokens(), b.tokens());
    assert_eq!(a.domains(), b.domains());
    for token in 0..a.len() {
        assert_eq!(a.row(token), b.row(token));
        for layer in 0..a.header().layers.len() {
            assert_eq!(a.weights(token, layer), b.weights(token, layer));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn jsonl_and_parquet_round_trip(trace in traces(false)) {
        let dir = folder();
        let mut text = Vec::new();
        write_jsonl(&trace, &mut text).unwrap();
        let back = read(&file(&dir, "t.jsonl", &text), Assume::default()).unwrap();
        if !trace.is_empty() {
            same(&back, &trace);
        }
        let path = dir.path().join("t.parquet");
        let out = fs::File::create(&path).unwrap();
        let mut writer = crate::Writer::new(out, trace.header().clone()).unwrap();
        for (index, token) in back.tokens().iter().enumerate() {
            for name in back.domains().names() {
                writer.domain(name).unwrap();
            }
            writer.push(token, back.row(index), back.weight_row(index)).unwrap();
        }
        writer.finish().unwrap();
        same(&read(&path, Assume::default()).unwrap(), &back);
    }

    #[test]
    fn route_csv_round_trips(trace in traces(true)) {
        // A layer of which no token has an expert is not in the file.
        let all = (0..trace.header().layers.len())
            .all(|layer| (0..trace.len()).any(|token| !trace.experts(token, layer).is_empty()));
        prop_assume!(!trace.is_empty() && all);
        let mut text = Vec::new();
        write_route_csv(&trace, &mut text).unwrap();
        let dir = folder();
        let back = read(&file(&dir, "t.csv", &text), Assume::default()).unwrap();
        same(&back, &trace);
    }
}

#[test]
fn batches_that_cannot_be_counted_on_are_damage() {
    let line = |batch: &str| format!("{{\"tok\":0,\"layers\":[[0]]{batch}}}\n");
    let last = line(",\"batch\":4294967295");
    assert!(told(&(last.clone() + &line(""))).contains("too many batches"));
    assert_eq!(of(&(last.clone() + &last)).unwrap().len(), 2);
}
