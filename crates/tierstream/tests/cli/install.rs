//! `./x install`.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Output};

use crate::support::{stderr, stdout};

/// Installs what is built already into `folder`, called from `dir`.
fn install(dir: &Path, folder: &str, path: &str) -> Output {
    Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../x"))
        .args(["install", folder])
        .current_dir(dir)
        .env("CARGO_TARGET_DIR", dir.join("target"))
        .env("PATH", path)
        .output()
        .unwrap()
}

#[test]
fn the_program_runs_through_the_link() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let dir = dir.path().canonicalize().unwrap();
    for folder in ["tools", "target", "mine"] {
        fs::create_dir(dir.join(folder)).unwrap();
    }
    let built = Path::new(env!("CARGO_BIN_EXE_tierstream")).parent().unwrap();
    symlink(built, dir.join("target/release")).unwrap();
    let cargo = dir.join("tools/cargo");
    fs::write(&cargo, "#!/bin/sh\n").unwrap();
    fs::set_permissions(&cargo, fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!("{}:{}", dir.join("tools").display(), std::env::var("PATH").unwrap());

    // A folder is one of the caller's, and may not be there yet.
    let first = install(&dir, "some/bin", &path);
    assert!(first.status.success(), "{first:?}");
    let bin = dir.join("some/bin");
    assert!(stderr(&first).contains(&format!("note: {} is not on the PATH", bin.display())));
    let version = Command::new(bin.join("tierstream")).arg("--version").output().unwrap();
    assert!(stdout(&version).starts_with("tierstream "), "{version:?}");

    let again = install(&dir, "some/bin", &format!("{path}:{}", bin.display()));
    assert!(again.status.success(), "{again:?}");
    assert!(!stderr(&again).contains("note:"), "{again:?}");

    // What is not ours stays.
    fs::write(dir.join("mine/tierstream"), "mine").unwrap();
    let refused = install(&dir, "mine", &path);
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    assert_eq!(fs::read_to_string(dir.join("mine/tierstream")).unwrap(), "mine");
}
