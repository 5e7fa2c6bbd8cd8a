//! Where the program keeps what it can make again.

use std::path::PathBuf;
#[cfg(feature = "demo")]
use std::{
    fs, io,
    os::unix::fs::{DirBuilderExt, MetadataExt},
    path::Path,
};

/// `$TIERSTREAM_CACHE`, else `$XDG_CACHE_HOME/tierstream`, else `~/.cache/tierstream`; none where
/// none of them is set.
pub fn dir() -> Option<PathBuf> {
    let var = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    var("TIERSTREAM_CACHE")
        .or_else(|| var("XDG_CACHE_HOME").map(|d| d.join("tierstream")))
        .or_else(|| var("HOME").map(|d| d.join(".cache/tierstream")))
}

/// Where checksums of weights are recorded: a folder in [`dir`].
pub fn weight_sums() -> Option<PathBuf> {
    dir().map(|dir| dir.join("weights"))
}

/// Whether the user has named the folder, and wants no other.
#[cfg(feature = "demo")]
pub(crate) fn is_named() -> bool {
    std::env::var_os("TIERSTREAM_CACHE").is_some_and(|v| !v.is_empty())
}

/// A folder for this user alone among the temporary files, made if it is not there.
///
/// # Errors
/// What the system says, or that the folder is another user's: others may write there, too.
#[cfg(feature = "demo")]
pub(crate) fn temporary() -> io::Result<PathBuf> {
    private(&std::env::temp_dir())
}

#[cfg(feature = "demo")]
fn private(parent: &Path) -> io::Result<PathBuf> {
    let me = rustix::process::getuid().as_raw();
    let dir = parent.join(format!("tierstream-{me}"));
    match fs::DirBuilder::new().mode(0o700).create(&dir) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
        _ => {}
    }
    let found = fs::symlink_metadata(&dir)?;
    if found.is_dir() && found.uid() == me && found.mode() & 0o022 == 0 {
        return Ok(dir);
    }
    let why = format!("{} is not a folder of this user alone", dir.display());
    Err(io::Error::new(io::ErrorKind::PermissionDenied, why))
}

#[cfg(all(test, feature = "demo"))]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::private;

    #[test]
    fn a_temporary_folder_is_the_users_alone() {
        let parent = tempfile::tempdir().unwrap();
        let dir = private(parent.path()).unwrap();
        assert_eq!(private(parent.path()).unwrap(), dir);
        assert_eq!(fs::metadata(&dir).unwrap().permissions().mode() & 0o777, 0o700);
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o777)).unwrap();
        assert!(private(parent.path()).is_err());
        fs::remove_dir(&dir).unwrap();
        std::os::unix::fs::symlink(parent.path(), &dir).unwrap();
        assert!(private(parent.path()).is_err());
    }
}
