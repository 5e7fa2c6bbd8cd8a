//! `tierstream trace`.

use std::fs;

use crate::support::{json, output, stderr, stdout};

const CSV: &str = "# route_trace v1
# model=m.gguf arch=olmoe n_layer=2 n_expert=8 n_expert_used=2
# layer=0 expert_bytes=100 dense_bytes=0
# layer=1 expert_bytes=200 dense_bytes=0
turn,phase,step,layer,slot,expert,weight,residency,expert_bytes
0,0,0,0,0,1,0.5,0,100
0,0,0,0,1,2,0.25,0,100
0,0,0,1,0,3,nan,0,200
0,1,1,0,0,7,0.5,0,100
0,1,1,1,0,0,0.5,0,200
";

#[test]
fn traces_go_in_and_out() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    fs::write(path("in.csv"), CSV).unwrap();
    let mut object =
        json(&["trace", "import", &path("in.csv"), &path("t.parquet"), "--domain", "prose"]);
    assert_eq!(object["file_bytes"], fs::metadata(path("t.parquet")).unwrap().len());
    object["file"] = "FILE".into();
    object["file_bytes"] = 0.into();
    insta::assert_json_snapshot!(object);
    let exported = output(["trace", "export", &path("t.parquet"), &path("out.csv")]);
    assert!(exported.status.success(), "{exported:?}");
    assert_eq!(fs::read_to_string(path("out.csv")).unwrap(), CSV);
    let lines = output(["trace", "export", &path("t.parquet")]);
    assert!(stdout(&lines).lines().nth(2).unwrap().contains("\"domain\":\"prose\""), "{lines:?}");
    fs::write(path("out.jsonl"), &lines.stdout).unwrap();
    json(&["trace", "import", &path("out.jsonl"), &path("again.parquet")]);
    assert_eq!(fs::read(path("again.parquet")).unwrap(), fs::read(path("t.parquet")).unwrap());
}

#[test]
fn damage_is_told_with_its_line_and_leaves_nothing() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    fs::write(path("in.csv"), CSV.replace("0,1,1,0,0,7", "0,1,1,0,0,8")).unwrap();
    let refused = output(["trace", "import", &path("in.csv"), &path("t.parquet")]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(stderr(&refused).contains("in.csv: line 9: no expert 8, there are 8"), "{refused:?}");
    fs::write(path("in.arrow"), b"ARROW1\0\0").unwrap();
    let refused = output(["trace", "import", &path("in.arrow"), &path("t.parquet")]);
    assert!(stderr(&refused).contains("hint: what moe-lrc publishes"), "{refused:?}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
}

/// `tierstream trace demo` with more arguments.
fn record(arguments: &[&str]) -> serde_json::Value {
    json(&[&["trace", "demo"], arguments].concat())
}

/// The lines of a trace, the header first.
fn lines(path: &str) -> Vec<serde_json::Value> {
    let exported = output(["trace", "export", path, "-"]);
    assert!(exported.status.success(), "{exported:?}");
    stdout(&exported).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn answers_are_recorded_the_same_whatever_is_in_memory() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    fs::write(path("sea.txt"), "The sea was calm\n\nSir, said the captain,\n").unwrap();
    let asked = ["--prompts", &path("sea.txt"), "--tokens", "12", "--temp", "0", "-o"];
    let (t, small) = (path("t.parquet"), path("small.parquet"));
    let mut object = record(&[&asked[..], &[&t]].concat());
    assert_eq!(object["file_bytes"], fs::metadata(&t).unwrap().len());
    object["file"] = "FILE".into();
    (object["file_bytes"], object["total_s"]) = (0.into(), 0.into());
    insta::assert_json_snapshot!(object);
    record(&[&asked[..], &[&small, "--experts", "25%"]].concat());
    let lines = lines(&t);
    assert_eq!(lines, self::lines(&small));

    let header = &lines[0]["header"];
    assert!(header["model"]["hash"].as_str().unwrap().starts_with("xxh3:"), "{header}");
    let expected = serde_json::json!({
        "block": 5, "experts": 64, "used": 8, "record_bytes": 41_472,
    });
    assert_eq!((&header["layers"][5], &header["ranked"]), (&expected, &true.into()));
    assert_eq!(header["sampling"]["temperature"], 0.0);
    let decoded: Vec<_> = lines.iter().filter(|line| line["phase"] == "decode").collect();
    // The last token of an answer is not computed any more.
    assert_eq!(decoded.len(), 2 * 11);
    for line in decoded {
        assert_eq!(line["domain"], "sea", "{line}");
        for layer in 0..6 {
            let weights = line["weights"][layer].as_array().unwrap();
            assert_eq!((weights.len(), line["layers"][layer].as_array().unwrap().len()), (8, 8));
        }
    }
    let metrics = json(&["eval", "metrics", &t, "--no-controls"]);
    assert_eq!(metrics["tokens"]["decode"], 22);
}

#[test]
fn texts_are_recorded_as_if_they_were_decoded() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    fs::create_dir_all(dir.path().join("texts/code")).unwrap();
    fs::write(path("texts/code/a.rs"), "fn main() { println!(\"sea\"); }\n".repeat(20)).unwrap();
    fs::write(path("texts/prose.txt"), "It was a cold evening in November. ".repeat(20)).unwrap();
    let t = path("t.parquet");
    let object = record(&[
        "--text",
        &path("texts"),
        "-o",
        &t,
        "--ctx",
        "64",
        "--tokens",
        "100",
        "--batch",
        "16",
    ]);
    // Two texts, each in parts of a context of 64 and of 36.
    assert_eq!((&object["prompts"], &object["tokens"]["decode"]), (&4.into(), &200.into()));
    let lines = &lines(&t)[1..];
    let batches: Vec<_> = lines.iter().map(|line| line["batch"].as_u64().unwrap()).collect();
    assert!(batches.is_sorted_by(|a, b| a < b), "each token by itself: {batches:?}");
    let of =
        |line: &serde_json::Value| (line["prompt"].as_u64().unwrap(), line["domain"].to_string());
    let mut prompts: Vec<_> = lines.iter().map(of).collect();
    prompts.dedup();
    let named = |n, name: &str| (n, format!("{name:?}"));
    let expected = [named(0, "code"), named(1, "code"), named(2, "prose"), named(3, "prose")];
    assert_eq!(prompts, expected);
    assert!(lines.iter().all(|line| line["layers"][5].as_array().unwrap().len() == 8));
}

#[test]
fn what_cannot_be_recorded_is_told_and_leaves_nothing() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    fs::write(path("long.txt"), "The sea was calm. ".repeat(40)).unwrap();
    let out = path("t.parquet");
    let refused =
        output(["trace", "demo", "--prompts", &path("long.txt"), "-o", &out, "--ctx", "64"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(stderr(&refused).contains("long.txt: line 1: "), "{refused:?}");
    assert!(stderr(&refused).contains("--ctx"), "{refused:?}");
    let refused = output(["trace", "demo", "--prompts", &path("long.txt")]);
    assert_eq!(refused.status.code(), Some(2), "{refused:?}");
    let refused = output(["trace", "demo", "-o", &out]);
    assert_eq!(refused.status.code(), Some(2), "{refused:?}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}
