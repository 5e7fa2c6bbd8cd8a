//! Generates the bindings for ggml's private structs (buffer, device and backend vtables, cgraph)
//! from the very headers that llama-cpp-sys-2 vendors, so that their layout cannot drift from the
//! library that is linked (the public API comes from llama-cpp-sys-2 itself), and puts the shared
//! libraries where programs find them.

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
    let built = built_llama();
    let ggml = vendored_ggml(&built);
    put_libraries_beside_programs(&built.join("lib"));
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

/// Where llama-cpp-sys-2 built and installed llama.cpp: its OUT_DIR. It exports only the folder of
/// its CMake package in there, `lib/cmake`.
fn built_llama() -> PathBuf {
    let cmake =
        env::var("DEP_LLAMA_GGML_CMAKE_DIR").expect("llama-cpp-sys-2 exports ggml_cmake_dir");
    Path::new(&cmake).ancestors().nth(2).expect("<out>/lib/cmake").to_owned()
}

/// The `ggml/` folder of the llama.cpp source that was built, from the CMake cache.
fn vendored_ggml(built: &Path) -> PathBuf {
    let cache = built.join("build/CMakeCache.txt");
    let text = fs::read_to_string(&cache)
        .unwrap_or_else(|e| panic!("cannot read {}: {e}", cache.display()));
    let source = text
        .lines()
        .find_map(|l| l.strip_prefix("CMAKE_HOME_DIRECTORY:INTERNAL="))
        .unwrap_or_else(|| panic!("{} names no source folder", cache.display()));
    Path::new(source).join("ggml")
}

/// Links the shared libraries, under the names that programs load them by (`libllama.so.0`), into
/// the folders where cargo puts programs, tests and examples; their run path is `$ORIGIN`
/// (`.cargo/config.toml`). llama-cpp-sys-2 does so for the development names only.
fn put_libraries_beside_programs(libraries: &Path) {
    let out_dir = PathBuf::from(env::var("OUT_DIR").expect("cargo sets OUT_DIR"));
    let profile = out_dir.ancestors().nth(3).expect("<profile>/build/<crate>/out");
    for entry in fs::read_dir(libraries).expect("llama-cpp-sys-2 has installed its libraries") {
        let path = entry.expect("a readable folder").path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let is_soname = name.split_once(".so.").is_some_and(|(_, v)| !v.contains('.'));
        if !is_soname {
            continue;
        }
        for folder in ["", "deps", "examples"] {
            let folder = profile.join(folder);
            fs::create_dir_all(&folder).expect("cargo's own folder");
            let link = folder.join(&name);
            let _ = fs::remove_file(&link); // of an earlier build
            fs::copy(&path, &link)
                .unwrap_or_else(|e| panic!("cannot write {}: {e}", link.display()));
        }
    }
}
