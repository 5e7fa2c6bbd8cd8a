//! ggml backends that a user adds: `TIERSTREAM_BACKENDS`.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

use crate::support::{PROMPT, stderr, stdout, tierstream};

/// A backend with one device, a GPU that can do nothing, as ggml-backend-impl.h has them. `VERSION`
/// is that of the interface.
const SOURCE: &str = r#"
#include <stdbool.h>
#include <stddef.h>
struct device {
    const char *(*get_name)(struct device *);
    const char *(*get_description)(struct device *);
    void (*get_memory)(struct device *, size_t *, size_t *);
    int (*get_type)(struct device *);
    void (*get_props)(struct device *, void *);
    void *(*init_backend)(struct device *, const char *);
    void *(*get_buffer_type)(struct device *);
    void *(*get_host_buffer_type)(struct device *);
    void *(*buffer_from_host_ptr)(struct device *, void *, size_t, size_t);
    bool (*supports_op)(struct device *, const void *);
    bool (*supports_buft)(struct device *, void *);
    bool (*offload_op)(struct device *, const void *);
    void *(*event_new)(struct device *);
    void (*event_free)(struct device *, void *);
    void (*event_synchronize)(struct device *, void *);
    struct reg *reg;
    void *context;
};
struct reg {
    int api_version;
    const char *(*get_name)(struct reg *);
    size_t (*get_device_count)(struct reg *);
    struct device *(*get_device)(struct reg *, size_t);
    void *(*get_proc_address)(struct reg *, const char *);
    void *context;
};
static const char *device_name(struct device *d) { return "TOY0"; }
static const char *description(struct device *d) { return "a toy"; }
static void memory(struct device *d, size_t *free, size_t *total) { *free = 1 << 20; *total = 2 << 20; }
static int type(struct device *d) { return 1; }
static void *backend(struct device *d, const char *p) { return NULL; }
static void *buffer_type(struct device *d) { return NULL; }
static bool no_op(struct device *d, const void *op) { return false; }
static bool no_buffer(struct device *d, void *b) { return false; }
static const char *name(struct reg *r) { return "toy"; }
static size_t count(struct reg *r) { return 1; }
static struct device the_device;
static struct device *device(struct reg *r, size_t i) { return &the_device; }
static void *proc(struct reg *r, const char *n) { return NULL; }
static struct reg it = { VERSION, name, count, device, proc, NULL };
struct reg *ggml_backend_init(void) {
    the_device = (struct device) {
        .get_name = device_name, .get_description = description, .get_memory = memory,
        .get_type = type, .init_backend = backend, .get_buffer_type = buffer_type,
        .supports_op = no_op, .supports_buft = no_buffer, .reg = &it,
    };
    return &it;
}
"#;

fn build(dir: &Path, name: &str, version: u32) {
    let source = dir.join("toy.c");
    fs::write(&source, SOURCE).unwrap();
    let built = Command::new("cc")
        .args(["-shared", "-fPIC", &format!("-DVERSION={version}"), "-o"])
        .arg(dir.join(name))
        .arg(&source)
        .status()
        .unwrap();
    assert!(built.success());
}

fn with_backends(places: &Path, args: &[&str]) -> Output {
    let output = tierstream().args(args).env("TIERSTREAM_BACKENDS", places).output().unwrap();
    assert!(output.status.success(), "{args:?}: {output:?}");
    output
}

#[test]
fn what_cannot_be_used_is_noted_and_the_rest_works() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    build(dir.path(), "libggml-old.so", 2);
    fs::write(dir.path().join("libggml-text.so"), "no library").unwrap();
    for args in [
        &["doctor", "demo", "--no-measure"][..],
        &["run", "demo", PROMPT, "-n", "2"],
        &["verify", "demo", "--tokens", "2", "--experts", "50%"],
        &["bench", "decode", "demo", "--experts", "50%,100%", "--repeats", "1", "-n", "2"],
    ] {
        let output = with_backends(dir.path(), args);
        let told = stderr(&output);
        let refused: Vec<_> = told.lines().filter(|l| l.contains("not a usable backend")).collect();
        let [old, text] = refused[..] else { panic!("{args:?}: {told}") };
        for (line, name) in [(old, "libggml-old.so"), (text, "libggml-text.so")] {
            assert!(line.starts_with("note: ") && line.contains(name), "{line}");
        }
    }
}

#[test]
fn a_device_that_is_added_is_listed_and_leaves_the_model_on_the_cpu() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    build(dir.path(), "libggml-toy.so", 3);
    let output = with_backends(dir.path(), &["doctor", "demo", "--no-measure", "--json"]);
    assert_eq!(stderr(&output), "");
    let object: Value = serde_json::from_str(stdout(&output)).unwrap();
    let devices = object["devices"].as_array().unwrap();
    let toy = devices.iter().find(|d| d["name"] == "TOY0").expect("it is listed");
    assert_eq!(toy["kind"], "gpu");
    assert_eq!(toy["memory_total_bytes"], 2 << 20);

    let args = ["run", "demo", PROMPT, "-n", "8", "--temp", "0", "--experts", "50%"];
    let plain = tierstream().args(args).output().unwrap();
    assert!(plain.status.success(), "{plain:?}");
    let beside = with_backends(dir.path(), &args);
    assert_eq!(stdout(&beside), stdout(&plain));
    let stock = ["bench", "decode", "demo", "--experts", "100%", "--against", "stock"];
    with_backends(dir.path(), &[&stock[..], &["--repeats", "1", "-n", "2"]].concat());
}
