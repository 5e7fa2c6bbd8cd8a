//! Prompts in files: one each. A file is good, or is not used: it ends with the checksum of all before.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use twox_hash::XxHash3_128;

use super::{Model, common};
use crate::engine::Token;

const MAGIC: &[u8; 8] = b"TSPROMP1";
/// The magic, the model, and two counts: of tokens, and of bytes of state.
const HEAD_BYTES: usize = 8 + 16 + 8 + 8;
const SUM_BYTES: u64 = 16;
const EXTENSION: &str = "prompt";

/// Nobody takes so long to write a file.
const PARTIAL_TIME_MAX: Duration = Duration::from_secs(3600);

/// More tokens than any context has.
const TOKENS_MAX: u64 = 1 << 24;

/// The files of a folder.
#[derive(Debug)]
pub(super) struct Files {
    folder: PathBuf,
    bytes_max: u64,
    known: Mutex<Known>,
}

/// Of the models that were asked for, whose files are looked through once.
#[derive(Debug, Default)]
struct Known {
    models: Vec<Model>,
    files: Vec<PromptFile>,
}

/// A file, by what it begins with.
#[derive(Debug, Clone)]
pub(super) struct PromptFile {
    model: Model,
    tokens: Vec<Token>,
    path: PathBuf,
    state_bytes: u64,
}

impl PromptFile {
    pub(super) fn state_bytes(&self) -> u64 {
        self.state_bytes
    }

    fn bytes(&self) -> u64 {
        HEAD_BYTES as u64 + 4 * self.tokens.len() as u64 + self.state_bytes + SUM_BYTES
    }
}

impl Files {
    pub(super) fn new(folder: PathBuf, bytes_max: u64) -> Self {
        Self { folder, bytes_max, known: Mutex::default() }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The file that has most tokens of a prompt, and at least `enough`.
    pub(super) fn best(&self, model: Model, prompt: &[Token], enough: usize) -> Option<PromptFile> {
        let mut known = self.known();
        if !known.models.contains(&model) {
            known.models.push(model);
            let found = self.of_model(model).unwrap_or_default();
            known.files.extend(found);
        }
        let ours = known.files.iter().filter(|file| file.model == model);
        let best = ours.max_by_key(|file| common(&file.tokens, prompt))?;
        (common(&best.tokens, prompt) >= enough).then(|| best.clone())
    }

    fn of_model(&self, model: Model) -> io::Result<Vec<PromptFile>> {
        let begins = format!("{:032x}-", model.0);
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.folder)? {
            let path = entry?.path();
            let named = path.file_name().and_then(|name| name.to_str());
            if !named.is_some_and(|name| name.starts_with(&begins)) || !is_prompt(&path) {
                continue;
            }
            match head(&path) {
                Ok(file) if file.model == model => found.push(file),
                // Of an earlier version, or half of one: nobody will use it.
                Err(error) if is_bad(&error) => drop(fs::remove_file(&path)),
                _ => {}
            }
        }
        Ok(found)
    }

    /// What a file has. One that is not as it was written is removed.
    pub(super) fn read(&self, file: &PromptFile) -> Option<(Vec<Token>, Vec<u8>)> {
        match read(file) {
            Ok(state) => {
                // What was used last stays longest.
                let touched = File::options().append(true).open(&file.path);
                drop(touched.and_then(|opened| opened.set_modified(SystemTime::now())));
                Some((file.tokens.clone(), state))
            }
            Err(error) => {
                if is_bad(&error) {
                    self.remove(&file.path);
                }
                None
            }
        }
    }

    fn remove(&self, path: &Path) {
        drop(fs::remove_file(path));
        self.known().files.retain(|file| file.path != path);
    }

    /// Writes a file, in place of those with what it begins with. Without room for it there is none.
    pub(super) fn write(&self, model: Model, tokens: &[Token], state: &[u8]) {
        let hash = XxHash3_128::oneshot(&bytes_of(tokens));
        let path = self.folder.join(format!("{:032x}-{hash:032x}.{EXTENSION}", model.0));
        let state_bytes = state.len() as u64;
        let file = PromptFile { model, tokens: tokens.to_vec(), path, state_bytes };
        if file.bytes() > self.bytes_max || self.make_room(file.bytes()).is_err() {
            return;
        }
        let temporary = self.folder.join(format!("{hash:032x}.{}.partial", std::process::id()));
        let written =
            write(&temporary, &file, state).and_then(|()| fs::rename(&temporary, &file.path));
        if written.is_err() {
            drop(fs::remove_file(&temporary));
            return;
        }
        let begins = |other: &PromptFile| {
            other.model == model && other.path != file.path && tokens.starts_with(&other.tokens)
        };
        let mut known = self.known();
        let replaced: Vec<_> = known.files.extract_if(.., |other| begins(other)).collect();
        known.files.retain(|other| other.path != file.path);
        known.files.push(file);
        drop(known);
        replaced.iter().for_each(|other| drop(fs::remove_file(&other.path)));
    }

    /// Removes what was not used for longest, until there is room for so many bytes.
    fn make_room(&self, bytes: u64) -> io::Result<()> {
        DirBuilder::new().recursive(true).mode(0o700).create(&self.folder)?;
        let mut files = Vec::new();
        for entry in fs::read_dir(&self.folder)? {
            let entry = entry?;
            let metadata = entry.metadata()?;
            let is_old = metadata.modified()?.elapsed().is_ok_and(|age| age > PARTIAL_TIME_MAX);
            if entry.path().extension().is_some_and(|extension| extension == "partial") && is_old {
                // Of a program that did not end as it should have.
                drop(fs::remove_file(entry.path()));
            }
            if is_prompt(&entry.path()) {
                files.push((metadata.modified()?, metadata.len(), entry.path()));
            }
        }
        files.sort();
        let mut used: u64 = files.iter().map(|(_, len, _)| len).sum();
        for (_, len, path) in files {
            if used + bytes <= self.bytes_max {
                break;
            }
            self.remove(&path);
            used -= len;
        }
        Ok(())
    }
}

fn is_prompt(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == EXTENSION)
}

/// Whether what is written there is wrong, and not that it cannot be read now.
fn is_bad(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof)
}

fn bytes_of(tokens: &[Token]) -> Vec<u8> {
    tokens.iter().flat_map(|token| token.to_le_bytes()).collect()
}

fn head_of(file: &PromptFile) -> Vec<u8> {
    let mut head = MAGIC.to_vec();
    head.extend(file.model.0.to_le_bytes());
    head.extend((file.tokens.len() as u64).to_le_bytes());
    head.extend(file.state_bytes.to_le_bytes());
    head.extend(bytes_of(&file.tokens));
    head
}

fn write(path: &Path, file: &PromptFile, state: &[u8]) -> io::Result<()> {
    let mut out =
        OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    let head = head_of(file);
    let mut sum = XxHash3_128::new();
    sum.write(&head);
    sum.write(state);
    out.write_all(&head)?;
    out.write_all(state)?;
    out.write_all(&sum.finish_128().to_le_bytes())
}

/// What a file is, if it is as long as it says.
fn head(path: &Path) -> io::Result<PromptFile> {
    let wrong = || io::Error::from(io::ErrorKind::InvalidData);
    let mut input = File::open(path)?;
    let mut head = [0; HEAD_BYTES];
    input.read_exact(&mut head)?;
    let (magic, rest) = head.split_first_chunk::<8>().ok_or_else(wrong)?;
    let (model, rest) = rest.split_first_chunk::<16>().ok_or_else(wrong)?;
    let (n, state_bytes) = rest.split_first_chunk::<8>().ok_or_else(wrong)?;
    let n = u64::from_le_bytes(*n);
    let state_bytes = u64::from_le_bytes(state_bytes.try_into().map_err(|_| wrong())?);
    if magic != MAGIC || n > TOKENS_MAX {
        return Err(wrong());
    }
    let expected = (HEAD_BYTES as u64 + 4 * n + SUM_BYTES).checked_add(state_bytes);
    if expected != Some(input.metadata()?.len()) {
        return Err(wrong());
    }
    let mut tokens = vec![0; 4 * usize::try_from(n).map_err(|_| wrong())?];
    input.read_exact(&mut tokens)?;
    let tokens = tokens.as_chunks().0.iter().map(|&bytes| Token::from_le_bytes(bytes)).collect();
    let model = Model(u128::from_le_bytes(*model));
    Ok(PromptFile { model, tokens, path: path.to_owned(), state_bytes })
}

/// The state in a file.
fn read(file: &PromptFile) -> io::Result<Vec<u8>> {
    let wrong = || io::Error::from(io::ErrorKind::InvalidData);
    let mut input = File::open(&file.path)?;
    let mut head = head_of(file);
    let expected = head.clone();
    input.read_exact(&mut head)?;
    let mut state = vec![0; usize::try_from(file.state_bytes).map_err(|_| wrong())?];
    input.read_exact(&mut state)?;
    let mut sum = [0; 16];
    input.read_exact(&mut sum)?;
    let mut computed = XxHash3_128::new();
    computed.write(&head);
    computed.write(&state);
    let good = head == expected && computed.finish_128().to_le_bytes() == sum;
    if good { Ok(state) } else { Err(wrong()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODEL: Model = Model(7);

    fn tokens(first: Token) -> Vec<Token> {
        (first..).take(50).collect()
    }

    fn found(files: &Files, first: Token) -> Option<Vec<u8>> {
        let file = files.best(MODEL, &tokens(first), 50)?;
        let (has, state) = files.read(&file)?;
        assert_eq!(has, tokens(first));
        Some(state)
    }

    fn all(folder: &Path) -> Vec<PathBuf> {
        fs::read_dir(folder).expect("it is there").map(|e| e.expect("readable").path()).collect()
    }

    /// Whatever happens to a byte of a file, it is not used, and not there any more afterwards.
    #[test]
    fn damaged_files_are_not_used() {
        let folder = tempfile::tempdir().expect("a folder");
        let state: Vec<u8> = (0..200).collect();
        let write = || Files::new(folder.path().into(), 1 << 20).write(MODEL, &tokens(0), &state);
        write();
        let [path] = &all(folder.path())[..] else { panic!("one file") };
        let good = fs::read(path).expect("readable");
        assert_eq!(found(&Files::new(folder.path().into(), 1 << 20), 0), Some(state.clone()));
        let damaged = (0..good.len()).map(|at| {
            let mut bytes = good.clone();
            bytes[at] ^= 1 << (at % 8);
            bytes
        });
        let cut = (0..good.len()).map(|len| good[..len].to_vec());
        for bytes in damaged.chain(cut) {
            fs::write(path, &bytes).expect("writable");
            assert_eq!(found(&Files::new(folder.path().into(), 1 << 20), 0), None);
            // One that was known before, too.
            fs::write(path, &good).expect("writable");
            let files = Files::new(folder.path().into(), 1 << 20);
            let file = files.best(MODEL, &tokens(0), 50).expect("it is good");
            fs::write(path, &bytes).expect("writable");
            assert!(files.read(&file).is_none());
            assert_eq!(all(folder.path()), [] as [PathBuf; 0]);
        }
        write();
        assert_eq!(found(&Files::new(folder.path().into(), 1 << 20), 0), Some(state));
    }

    #[test]
    fn the_oldest_files_go_first() {
        let folder = tempfile::tempdir().expect("a folder");
        let bytes = |n: u64| HEAD_BYTES as u64 + 200 + n + SUM_BYTES;
        let files = Files::new(folder.path().into(), 3 * bytes(100));
        // Times of files are no finer than a tick of the kernel's.
        let age = |first: Token, seconds: u64| {
            let file = files.best(MODEL, &tokens(first), 50).expect("it is there");
            let time = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(seconds);
            let opened = File::options().append(true).open(file.path).expect("ours");
            opened.set_modified(time).expect("ours");
        };
        for first in 1..=3 {
            files.write(MODEL, &tokens(100 * first), &[1; 100]);
            age(100 * first, 10 - u64::try_from(first).expect("positive"));
        }
        assert!(found(&files, 300).is_some());
        files.write(MODEL, &tokens(400), &[1; 100]);
        assert_eq!(
            [100, 200, 300, 400].map(|first| found(&files, first).is_some()),
            [true, false, true, true]
        );
        // What has no room at all takes nobody's.
        files.write(MODEL, &tokens(500), &[1; 1000]);
        assert_eq!(all(folder.path()).len(), 3);
    }

    #[test]
    fn files_are_for_the_user_alone() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().expect("a folder");
        let prompts = folder.path().join("a/prompts");
        Files::new(prompts.clone(), 1 << 20).write(MODEL, &tokens(0), &[1; 100]);
        let mode =
            |path: &Path| fs::metadata(path).expect("it is there").permissions().mode() & 0o777;
        assert_eq!(mode(&prompts), 0o700);
        assert_eq!(all(&prompts).iter().map(|path| mode(path)).collect::<Vec<_>>(), [0o600]);
    }
}
