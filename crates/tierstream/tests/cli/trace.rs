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
