//! Backends that are loaded at run time, from libraries that the test builds.

use std::fs;
use std::path::Path;
use std::process::Command;

use tierstream_ggml::{Error, devices, load_backends};

/// A registry entry as `ggml_backend_reg` (ggml-backend-impl.h), without devices.
const SOURCE: &str = r#"
#include <stddef.h>
struct reg {
    int api_version;
    const char *(*get_name)(struct reg *);
    size_t (*get_device_count)(struct reg *);
    void *(*get_device)(struct reg *, size_t);
    void *(*get_proc_address)(struct reg *, const char *);
    void *context;
};
static const char *name(struct reg *r) { return "toy"; }
static size_t count(struct reg *r) { return 0; }
static void *device(struct reg *r, size_t i) { return NULL; }
static void *proc(struct reg *r, const char *n) { return NULL; }
static struct reg it = { VERSION, name, count, device, proc, NULL };
struct reg *ggml_backend_init(void) { return &it; }
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

#[test]
fn what_fits_is_loaded_and_the_rest_refused_with_a_reason() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let dir = dir.path();
    let before = devices().len();
    build(dir, "libggml-a.so", 3);
    build(dir, "libggml-b.so", 2);
    fs::write(dir.join("libggml-c.so"), "no library").unwrap();
    // Not looked at: part of every build, or no backend by name.
    for name in ["libggml-base.so", "libggml-cpu.so", "libggml.so", "libfoo.so", "libggml-d.so.0"] {
        fs::write(dir.join(name), "no library").unwrap();
    }
    for _ in 0..2 {
        let results = load_backends(Some(dir));
        let [a, b, c] = &results[..] else { panic!("{results:?}") };
        assert_eq!(a.as_ref().unwrap(), "toy");
        for (refused, name, reason) in
            [(b, "libggml-b.so", "version"), (c, "libggml-c.so", "failed to load")]
        {
            let Err(Error::Backend(text)) = refused else { panic!("{refused:?}") };
            assert!(text.contains(name) && text.contains(reason), "{text}");
        }
    }
    assert_eq!(devices().len(), before, "it has no devices");
    // Beside this test program lie the libraries that it is linked with, and no others.
    assert!(load_backends(None).is_empty());
    let missing = load_backends(Some(&dir.join("libs")));
    assert!(matches!(&missing[..], [Err(Error::Backend(_))]), "{missing:?}");
}
