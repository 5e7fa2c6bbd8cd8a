//! Reading another program's files: bounded, and without writing.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use crate::error::{Error, Readers, Result};
use crate::limits;

/// What there is at a path.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) name: String,
    pub(crate) path: PathBuf,
}

/// A file below a root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Below {
    /// The names from the root to it, its own last.
    pub(crate) names: Vec<String>,
    pub(crate) path: PathBuf,
}

/// How many entries may yet be looked at.
#[derive(Debug)]
pub(crate) struct Left(usize);

impl Left {
    pub(crate) fn new() -> Self {
        Self(limits::MAX_ENTRIES)
    }
}

/// What is in a folder, by name; nothing if there is no folder. Names that are no text cannot be given,
/// and are left out.
pub(crate) fn entries(folder: &Path, left: &mut Left) -> Result<Vec<Entry>> {
    let all = match fs::read_dir(folder) {
        Ok(all) => all,
        Err(e) if is_missing(&e) => return Ok(Vec::new()),
        Err(e) => return Err(unreadable(folder, e)),
    };
    let mut entries = Vec::new();
    for entry in all {
        let entry = entry.map_err(|e| unreadable(folder, e))?;
        left.0 = left.0.checked_sub(1).ok_or_else(|| Error::Limit {
            path: folder.to_owned(),
            what: "the store has too many files",
            limit: limits::MAX_ENTRIES as u64,
        })?;
        if let Ok(name) = entry.file_name().into_string() {
            entries.push(Entry { name, path: entry.path() });
        }
    }
    entries.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(entries)
}

/// All files below `root` that `wanted` takes the names of, as deep as a store has them. Links are
/// followed; a folder is looked at once. What is not there any more when it is looked at, and folders
/// below the root that cannot be read, are left out.
pub(crate) fn walk(
    root: &Path,
    left: &mut Left,
    wanted: &dyn Fn(&str) -> bool,
) -> Result<Vec<Below>> {
    let (mut found, mut seen) = (Vec::new(), HashSet::new());
    let mut folders = vec![(root.to_owned(), Vec::new())];
    while let Some((folder, names)) = folders.pop() {
        match fs::canonicalize(&folder) {
            Ok(real) if seen.insert(real.clone()) => {}
            _ => continue,
        }
        let entries = match entries(&folder, left) {
            Err(Error::Unreadable { .. }) if !names.is_empty() => continue,
            entries => entries?,
        };
        // From the last one on, since the stack turns them round.
        for Entry { name, path } in entries.into_iter().rev() {
            let is_hidden = name.starts_with('.');
            let names: Vec<String> = names.iter().cloned().chain([name]).collect();
            let name = &names[names.len() - 1];
            if wanted(name) {
                if !path.is_dir() {
                    found.push(Below { names, path });
                }
            } else if names.len() <= limits::MAX_DEPTH && !is_hidden && path.is_dir() {
                folders.push((path, names));
            }
        }
    }
    found.sort_by(|a, b| a.names.cmp(&b.names));
    Ok(found)
}

/// All bytes of a file that may have so many.
pub(crate) fn read(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let unreadable = |e| unreadable(path, e);
    // Before opening: opening a pipe would wait for a writer.
    if !fs::metadata(path).map_err(unreadable)?.is_file() {
        return Err(damaged(path, "it is no file"));
    }
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(unreadable)?;
    file.take(limit + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    if bytes.len() as u64 > limit {
        return Err(Error::Limit { path: path.to_owned(), what: "the file is too long", limit });
    }
    Ok(bytes)
}

/// The length of the file at `path`, which may be a link, but not one that leads out of `root`; `None`
/// if it is not there.
pub(crate) fn len_within(path: &Path, root: &Path) -> Result<Option<u64>> {
    let real = match fs::canonicalize(path) {
        Ok(real) => real,
        Err(e) if is_missing(&e) => return Ok(None),
        Err(e) => return Err(unreadable(path, e)),
    };
    let root = fs::canonicalize(root).map_err(|e| unreadable(root, e))?;
    if !real.starts_with(&root) {
        return Err(Error::Outside { path: path.to_owned(), target: real });
    }
    len(path)
}

/// The length of the file at `path`; `None` if it is not there.
pub(crate) fn len(path: &Path) -> Result<Option<u64>> {
    match fs::metadata(path) {
        Ok(file) if file.is_file() => Ok(Some(file.len())),
        Ok(_) => Err(damaged(path, "it is no file")),
        Err(e) if is_missing(&e) => Ok(None),
        Err(e) => Err(unreadable(path, e)),
    }
}

/// Opens a file that was found to be one, to see whether this user may read it.
pub(crate) fn check_readable(path: &Path) -> Result<()> {
    File::open(path).map(drop).map_err(|e| unreadable(path, e))
}

/// When the file or folder was last written to, as far as that can be had.
pub(crate) fn modified(path: &Path) -> Option<std::time::SystemTime> {
    fs::metadata(path).and_then(|m| m.modified()).ok()
}

pub(crate) fn damaged(path: &Path, what: impl ToString) -> Error {
    Error::Damaged { path: path.to_owned(), what: what.to_string() }
}

fn is_missing(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

fn unreadable(path: &Path, source: io::Error) -> Error {
    let readers = match source.kind() {
        io::ErrorKind::PermissionDenied => readers_of(path),
        _ => Readers::Unknown,
    };
    Error::Unreadable { path: path.to_owned(), readers, source }
}

/// Who may read what stands in the way to `path`: the first of it and its folders that can be asked.
#[cfg(unix)]
fn readers_of(path: &Path) -> Readers {
    use std::os::unix::fs::MetadataExt;
    let asked = path.ancestors().find_map(|path| fs::metadata(path).ok());
    asked.map_or(Readers::Unknown, |found| {
        let groups = read(Path::new("/etc/group"), limits::MAX_SMALL_FILE_BYTES);
        let groups = groups.unwrap_or_default();
        let what = (found.is_dir(), found.mode(), found.gid());
        readers(what, &String::from_utf8_lossy(&groups))
    })
}

#[cfg(not(unix))]
fn readers_of(_: &Path) -> Readers {
    Readers::Unknown
}

/// Of a folder or file with this mode and group; `groups` is what `/etc/group` says.
#[cfg_attr(not(unix), allow(dead_code))]
fn readers((is_dir, mode, gid): (bool, u32, u32), groups: &str) -> Readers {
    let needed = if is_dir { 0o050 } else { 0o040 };
    // Nobody is to join root's for a model.
    if mode & needed != needed || gid == 0 {
        return Readers::Owner;
    }
    let name = groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        (fields.nth(1)?.parse() == Ok(gid)).then(|| name.to_owned())
    });
    Readers::Group(name.unwrap_or_else(|| gid.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_may_read_is_told() {
        let groups = "root:x:0:\nbroken\n:x:7:\nollama:x:998:me,you\n";
        let group = |name: &str| Readers::Group(name.to_owned());
        assert_eq!(readers((true, 0o40750, 998), groups), group("ollama"));
        assert_eq!(readers((false, 0o100640, 998), groups), group("ollama"));
        assert_eq!(readers((true, 0o40750, 7), groups), group("7"));
        // A folder that the group may list but not enter helps nobody.
        assert_eq!(readers((true, 0o40740, 998), groups), Readers::Owner);
        assert_eq!(readers((true, 0o40700, 998), groups), Readers::Owner);
        assert_eq!(readers((false, 0o100600, 998), groups), Readers::Owner);
        assert_eq!(readers((true, 0o40750, 0), groups), Readers::Owner);
    }

    #[test]
    fn what_stands_in_the_way_is_what_can_be_asked() {
        let dir = tempfile::tempdir().unwrap();
        let below = dir.path().join("a/b/c");
        let e = || io::Error::from(io::ErrorKind::PermissionDenied);
        let alone = std::os::unix::fs::PermissionsExt::from_mode(0o700);
        fs::set_permissions(dir.path(), alone).unwrap();
        let Error::Unreadable { readers, .. } = unreadable(&below, e()) else { panic!() };
        assert_eq!(readers, Readers::Owner);
        let Error::Unreadable { readers, .. } =
            unreadable(&below, io::ErrorKind::Interrupted.into())
        else {
            panic!()
        };
        assert_eq!(readers, Readers::Unknown);
    }

    #[test]
    fn reads_are_bounded_and_of_files() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        fs::write(&path, b"12345").unwrap();
        assert_eq!(read(&path, 5).unwrap(), b"12345");
        assert!(matches!(read(&path, 4), Err(Error::Limit { limit: 4, .. })));
        assert!(matches!(read(dir.path(), 5), Err(Error::Damaged { .. })));
        assert!(matches!(read(&dir.path().join("none"), 5), Err(Error::Unreadable { .. })));
        let socket = dir.path().join("socket");
        let _held = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        assert!(matches!(read(&socket, 5), Err(Error::Damaged { .. })));
    }

    #[test]
    fn walks_end() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("1/2/3/4/5/6/7/8");
        fs::create_dir_all(&deep).unwrap();
        std::os::unix::fs::symlink(dir.path(), dir.path().join("1/round")).unwrap();
        std::os::unix::fs::symlink("nowhere", dir.path().join("1/dangling.x")).unwrap();
        for folder in ["", "1/2/3", "1/2/3/4/5/6", "1/2/3/4/5/6/7", ".hidden"] {
            let folder = dir.path().join(folder);
            fs::create_dir_all(&folder).unwrap();
            fs::write(folder.join("file.x"), b"").unwrap();
        }
        let wanted = |name: &str| name.ends_with(".x");
        let found = walk(dir.path(), &mut Left::new(), &wanted).unwrap();
        let names: Vec<String> = found.iter().map(|file| file.names.join("/")).collect();
        let expected = ["1/2/3/4/5/6/file.x", "1/2/3/file.x", "1/dangling.x", "file.x"];
        assert_eq!(names, expected);
        assert!(matches!(walk(dir.path(), &mut Left(5), &wanted), Err(Error::Limit { .. })));
        assert!(walk(&dir.path().join("none"), &mut Left::new(), &wanted).unwrap().is_empty());
    }
}
