//! Generates the bindings for ggml's private structs (buffer, device and backend vtables, cgraph)
//! from the very headers that llama-cpp-sys-2 vendors, so that their layout cannot drift from the
//! library that is linked. The public API comes from llama-cpp-sys-2 itself.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

/// Structs that llama-cpp-sys-2 has only as opaque types.
const PRIVATE: &[&str] = &[
    "ggml_backend_buffer_type",
    "ggml_backend_buffer_type_i",
    "ggml_backend_buffer",
    "ggml_backend_buffer_i",
    "ggml_backend_graph_optimize_params",
    "ggml_backend",
    "ggml_backend_i",
    "ggml_backend_event",
    "ggml_backend_device",
    "ggml_backend_device_i",
    "ggml_backend_reg",
    "ggml_backend_reg_i",
    "ggml_cgraph",
    "ggml_hash_set",
];

/// Handles of the structs above.
const HANDLES: &[&str] = &[
    "ggml_backend_t",
    "ggml_backend_buffer_t",
    "ggml_backend_buffer_type_t",
    "ggml_backend_dev_t",
    "ggml_backend_event_t",
    "ggml_backend_reg_t",
    "ggml_bitset_t",
    "ggml_guid",
    "ggml_cgraph_eval_order",
];

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    let ggml = vendored_ggml();
    let mut builder = bindgen::Builder::default()
        .header(ggml.join("src/ggml-backend-impl.h").display().to_string())
        .header(ggml.join("src/ggml-impl.h").display().to_string())
        .clang_arg(format!("-I{}", ggml.join("include").display()))
        .clang_arg(format!("-I{}", ggml.join("src").display()))
        .allowlist_recursively(false)
        .allowlist_function("ggml_backend_buffer_init")
        .allowlist_var("GGML_BACKEND_API_VERSION")
        .prepend_enum_name(false)
        .layout_tests(true);
    for name in PRIVATE.iter().chain(HANDLES) {
        builder = builder.allowlist_type(name);
    }
    let out = PathBuf::from(env::var("OUT_DIR").expect("cargo sets OUT_DIR")).join("abi.rs");
    builder
        .generate()
        .expect("bindgen reads the vendored ggml headers (is libclang installed?)")
        .write_to_file(out)
        .expect("OUT_DIR is writable");
}

/// The `ggml/` folder of the llama.cpp source that llama-cpp-sys-2 built. The crate exports only
/// the folder of its installed CMake package, `<its OUT_DIR>/lib/cmake`; the CMake cache beside
/// it names the source.
fn vendored_ggml() -> PathBuf {
    let cmake = env::var("DEP_LLAMA_GGML_CMAKE_DIR").expect("llama-cpp-sys-2 exports ggml_cmake_dir");
    let out_dir = Path::new(&cmake).ancestors().nth(2).expect("<out>/lib/cmake");
    let cache = out_dir.join("build/CMakeCache.txt");
    let text = fs::read_to_string(&cache)
        .unwrap_or_else(|e| panic!("cannot read {}: {e}", cache.display()));
    let source = text
        .lines()
        .find_map(|l| l.strip_prefix("CMAKE_HOME_DIRECTORY:INTERNAL="))
        .unwrap_or_else(|| panic!("{} names no source folder", cache.display()));
    Path::new(source).join("ggml")
}
