//! Reads back what the generator wrote, with a parser of its own.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use proptest::prelude::*;
use tempfile::TempDir;
use tierstream_synth::{Arch, Quant, Role, Spec, TensorType, Written};

/// A parsed file: metadata as text, tensors with their data.
#[derive(Debug, Default)]
struct Parsed {
    metadata: BTreeMap<String, String>,
    tensors: Vec<(String, Vec<u64>, u32, Vec<u8>)>,
}

struct Cursor<'a>(&'a [u8], usize);

impl Cursor<'_> {
    fn bytes<const N: usize>(&mut self) -> [u8; N] {
        self.1 += N;
        self.0[self.1 - N..self.1].try_into().unwrap()
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.bytes())
    }

    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.bytes())
    }

    fn string(&mut self) -> String {
        let len = self.u64() as usize;
        self.1 += len;
        String::from_utf8(self.0[self.1 - len..self.1].to_vec()).unwrap()
    }

    fn value(&mut self) -> String {
        match self.u32() {
            2 => u16::from_le_bytes(self.bytes()).to_string(),
            4 => self.u32().to_string(),
            5 => i32::from_le_bytes(self.bytes()).to_string(),
            6 => f32::from_le_bytes(self.bytes()).to_string(),
            7 => (self.bytes::<1>()[0] == 1).to_string(),
            8 => self.string(),
            other => panic!("value type {other}"),
        }
    }
}

/// Reads one file and checks that it is dense: every tensor follows the one before, padded.
fn parse(path: &Path) -> Parsed {
    let file = fs::read(path).unwrap();
    let mut at = Cursor(&file, 0);
    assert_eq!(&at.bytes::<4>(), b"GGUF");
    assert_eq!(at.u32(), 3);
    let (n_tensors, n_metadata) = (at.u64(), at.u64());
    let mut parsed = Parsed::default();
    for _ in 0..n_metadata {
        let (key, value) = (at.string(), at.value());
        assert!(parsed.metadata.insert(key.clone(), value).is_none(), "{key} twice");
    }
    let alignment: u64 =
        parsed.metadata.get("general.alignment").map_or(32, |a| a.parse().unwrap());
    let heads: Vec<_> = (0..n_tensors)
        .map(|_| {
            let name = at.string();
            let n_dims = at.u32();
            let dims: Vec<u64> = (0..n_dims).map(|_| at.u64()).collect();
            (name, dims, at.u32(), at.u64())
        })
        .collect();
    let data = (at.1 as u64).next_multiple_of(alignment);
    let mut expected = 0;
    for (name, dims, id, offset) in heads {
        assert_eq!(offset, expected, "{name}");
        assert!(!parsed.tensors.iter().any(|t| t.0 == name), "{name} twice");
        let ty = TensorType::ALL.into_iter().find(|t| t.id() == id).unwrap();
        assert_eq!(dims[0] % ty.block_len(), 0, "{name}");
        let bytes = ty.bytes(dims.iter().product());
        let start = (data + offset) as usize;
        let content = file[start..start + bytes as usize].to_vec();
        parsed.tensors.push((name, dims, id, content));
        expected = (offset + bytes).next_multiple_of(alignment);
    }
    assert_eq!(file.len() as u64, data + expected);
    parsed
}

fn write(spec: &Spec) -> (TempDir, Written) {
    let dir = TempDir::new().unwrap();
    let written = spec.write(dir.path().join("m.gguf")).unwrap();
    let on_disk: u64 = written.files.iter().map(|f| fs::metadata(f).unwrap().len()).sum();
    assert_eq!(on_disk, written.bytes);
    (dir, written)
}

fn tensors_of(spec: &Spec) -> Vec<(String, Vec<u64>, u32, Vec<u8>)> {
    let (_dir, written) = write(spec);
    written.files.iter().flat_map(|f| parse(f).tensors).collect()
}

/// An architecture's default with fewer layers, so that a test writes little.
fn few_layers(arch: Arch) -> Spec {
    let mut spec =
        Spec::new(arch).experts(if arch.is_moe() { 8 } else { 0 }, u32::from(arch.is_moe()));
    spec.n_layer = 2;
    spec
}

#[test]
fn files_hold_what_the_plan_says() {
    for arch in Arch::ALL {
        let spec = Spec::new(arch);
        let (_dir, written) = write(&spec);
        let parsed = parse(&written.files[0]);
        let plan = spec.plan();
        assert_eq!(parsed.tensors.len(), plan.tensors.len());
        for (got, planned) in parsed.tensors.iter().zip(&plan.tensors) {
            assert_eq!((&got.0, &got.1, got.2), (&planned.name, &planned.dims, planned.ty.id()));
            assert_eq!(got.3.len() as u64, planned.bytes());
            if let Role::Expert { .. } = planned.role {
                assert_eq!(planned.dims.last(), Some(&u64::from(spec.n_expert)), "{}", got.0);
            }
        }
        let records: u64 = plan.records().iter().map(|(_, b)| b * u64::from(spec.n_expert)).sum();
        assert_eq!(written.expert_bytes, records);

        let prefix = arch.gguf_name();
        let value = |key: &str| parsed.metadata.get(&format!("{prefix}.{key}")).map(String::as_str);
        assert_eq!(parsed.metadata["general.architecture"], prefix);
        assert_eq!(parsed.metadata["tokenizer.ggml.model"], "no_vocab");
        assert_eq!(value("vocab_size"), Some("1024"));
        assert_eq!(value("block_count"), Some(spec.n_layer.to_string().as_str()));
        let experts = spec.n_expert.to_string();
        assert_eq!(value("expert_count"), arch.is_moe().then_some(experts.as_str()));
    }
}

#[test]
fn the_same_seed_gives_the_same_bytes() {
    let spec = few_layers(Arch::Qwen3Moe);
    let bytes = |spec: &Spec| {
        let (_dir, written) = write(spec);
        fs::read(&written.files[0]).unwrap()
    };
    assert_eq!(bytes(&spec), bytes(&spec));
    let mut other = spec.clone();
    other.seed = 1;
    for (a, b) in tensors_of(&spec).iter().zip(&tensors_of(&other)) {
        assert_ne!(a.3, b.3, "{}", a.0);
    }
}

#[test]
fn weights_do_not_depend_on_files_and_alignment() {
    for arch in Arch::ALL {
        let spec = few_layers(arch);
        let whole = tensors_of(&spec);
        let mut split = spec.clone();
        split.split_bytes = Some(400_000);
        assert!(whole == tensors_of(&split), "{arch}: split");
        let mut aligned = spec.clone();
        aligned.alignment = 4096;
        assert!(whole == tensors_of(&aligned), "{arch}: aligned");
    }
}

#[test]
fn split_files_say_so() {
    for (empty_first, arch) in [(false, Arch::Olmoe), (true, Arch::DeepSeek2)] {
        let mut spec = few_layers(arch);
        spec.split_bytes = Some(500_000);
        spec.split_empty_first = empty_first;
        spec.alignment = 64;
        let (_dir, written) = write(&spec);
        let count = written.files.len();
        assert!(count > 2);
        let mut seen = Vec::new();
        for (no, file) in written.files.iter().enumerate() {
            let name = file.file_name().unwrap().to_str().unwrap();
            assert_eq!(name, format!("m-{:05}-of-{count:05}.gguf", no + 1));
            let parsed = parse(file);
            assert_eq!(parsed.metadata["split.no"], no.to_string());
            assert_eq!(parsed.metadata["split.count"], count.to_string());
            let total = spec.plan().tensors.len().to_string();
            assert_eq!(parsed.metadata["split.tensors.count"], total);
            assert_eq!(parsed.metadata["general.alignment"], "64");
            assert_eq!(parsed.metadata.contains_key("general.architecture"), no == 0);
            assert_eq!(parsed.tensors.is_empty(), no == 0 && empty_first);
            let bytes: u64 = parsed.tensors.iter().map(|t| t.3.len() as u64).sum();
            assert!(bytes <= 500_000 || parsed.tensors.len() == 1);
            seen.extend(parsed.tensors.into_iter().map(|t| t.0));
        }
        let planned: Vec<_> = spec.plan().tensors.into_iter().map(|t| t.name).collect();
        assert_eq!(seen, planned);
    }
}

#[test]
fn fused_and_separate_layouts() {
    let names = |spec: &Spec| -> Vec<String> {
        spec.plan().tensors.into_iter().map(|t| t.name).filter(|n| n.contains("_exps")).collect()
    };
    let mut spec = few_layers(Arch::DeepSeek2);
    let separate =
        ["blk.1.ffn_gate_exps.weight", "blk.1.ffn_up_exps.weight", "blk.1.ffn_down_exps.weight"];
    assert_eq!(names(&spec), separate);
    let record = spec.plan().records();
    spec.fused_gate_up = true;
    assert_eq!(names(&spec), ["blk.1.ffn_gate_up_exps.weight", "blk.1.ffn_down_exps.weight"]);
    assert_eq!(spec.plan().records(), record);
}

#[test]
fn errors_name_the_file() {
    let spec = few_layers(Arch::Llama);
    let error = spec.write("/does/not/exist/m.gguf").unwrap_err().to_string();
    assert!(error.starts_with("/does/not/exist/m.gguf: "), "{error}");
}

fn arb_spec() -> impl Strategy<Value = Spec> {
    let arch = prop::sample::select(Arch::ALL.to_vec());
    let quant = prop::sample::select(
        TensorType::ALL.into_iter().map(Quant::from).chain([Quant::Q4_K_M]).collect::<Vec<_>>(),
    );
    (arch, quant, 1..12_u32, 0..12_u32, 5..11_u32, any::<u64>(), any::<bool>()).prop_map(
        |(arch, quant, experts, used, alignment, seed, split)| {
            let mut spec = Spec::new(arch).quant(quant);
            if arch.is_moe() {
                spec = spec.experts(experts, 1 + used % experts);
            }
            spec.n_layer = 2;
            spec.alignment = 1 << alignment;
            spec.seed = seed;
            spec.split_bytes = split.then_some(300_000);
            spec
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn any_valid_spec_writes_whole_files(spec in arb_spec()) {
        let (_dir, written) = write(&spec);
        let sizes = written.files.iter().flat_map(|f| parse(f).tensors).map(|t| t.3.len() as u64);
        prop_assert_eq!(sizes.sum::<u64>(), spec.plan().bytes());
    }
}
