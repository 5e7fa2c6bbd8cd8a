//! A libcufile for tests, of `cufile.c`, each with settings and counts of its own.

#![allow(dead_code)] // Every test binary uses its own part of this.

use std::ffi::{CString, c_char, c_long};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use libloading::Library;

/// The library, and files in place of the kernel's that say that it is supported.
pub(crate) struct Stub {
    library: Library,
    dir: tempfile::TempDir,
}

impl Stub {
    /// As NVIDIA's newest.
    pub(crate) fn new() -> Self {
        Self::compiled(&["-DCLOSE=cuFileDriverClose_v2"])
    }

    /// As before CUDA 12.9, without parameters.
    pub(crate) fn old() -> Self {
        Self::compiled(&["-DCLOSE=cuFileDriverClose", "-DOLD"])
    }

    /// A file of its own, so that it is a library of its own.
    fn compiled(flags: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../cuda/tests/support/cufile.c");
        let (library, compiler) = (dir.path().join("libcufile.so.0"), "cc");
        let built = Command::new(compiler)
            .args(["-std=gnu11", "-Wall", "-Werror", "-O1", "-shared", "-fPIC", "-o"])
            .args([&library, &source])
            .args(flags)
            .output()
            .unwrap_or_else(|error| panic!("these tests need a C compiler, `{compiler}`: {error}"));
        assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
        fs::write(dir.path().join("nvidia-fs0"), "").unwrap();
        fs::write(dir.path().join("kallsyms"), "0000000000000000 d p2pdma_pgmap_ops\n").unwrap();
        // SAFETY: our own, whose constructors do nothing.
        let library = unsafe { Library::new(library) }.unwrap();
        Self { library, dir }
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.dir.path().join("libcufile.so.0")
    }

    /// Something that is there, and shall say that the kernel has nvidia-fs.
    pub(crate) fn nvidia_fs(&self) -> PathBuf {
        self.dir.path().join("nvidia-fs0")
    }

    /// Symbols of a kernel that can do without it.
    pub(crate) fn symbols(&self) -> PathBuf {
        self.dir.path().join("kallsyms")
    }

    pub(crate) fn set(&self, name: &str, value: i64) {
        let name = CString::new(name).unwrap();
        // SAFETY: the function has this type.
        unsafe {
            let set = self.library.get::<unsafe extern "C" fn(*const c_char, c_long)>("stub_set");
            set.unwrap()(name.as_ptr(), value);
        }
    }

    pub(crate) fn get(&self, name: &str) -> i64 {
        let name = CString::new(name).unwrap();
        // SAFETY: as above.
        unsafe {
            let get = self.library.get::<unsafe extern "C" fn(*const c_char) -> c_long>("stub_get");
            get.unwrap()(name.as_ptr())
        }
    }

    /// Nothing is open or registered any more.
    #[track_caller]
    pub(crate) fn assert_ended(&self) {
        let counts = ["opened", "files", "buffers"].map(|name| self.get(name));
        assert_eq!(counts, [0, 0, 0], "opened, files, buffers");
        assert_eq!(self.get("opens"), self.get("closes"));
    }
}
