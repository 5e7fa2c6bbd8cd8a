//! What was computed of prompts, kept when their sequence goes to another: in memory, and if there is a folder
//! for it in files, which outlive the model and the program.

mod files;

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use self::files::Files;
use crate::engine::Token;

/// Tokens that are worth the copying.
pub(crate) const WORTH: usize = 32;

/// Where prompts are kept.
#[derive(Debug, Clone, Default)]
pub struct PromptCache {
    /// Bytes of memory; 0 keeps none.
    pub ram_bytes: u64,
    /// A folder for files of them. They hold what users wrote, and are for the user alone to read.
    pub folder: Option<PathBuf>,
    /// Bytes of that folder.
    pub folder_bytes: u64,
}

/// A sequence that was saved.
#[derive(Debug)]
pub(crate) struct Saved {
    pub(crate) tokens: Vec<Token>,
    pub(crate) state: Vec<u8>,
    /// Given back with it.
    _room: Room,
}

/// Bytes of the memory that there is for all of them.
#[derive(Debug)]
struct Room {
    used: Arc<AtomicU64>,
    bytes: u64,
}

impl Drop for Room {
    fn drop(&mut self) {
        self.used.fetch_sub(self.bytes, Ordering::AcqRel);
    }
}

/// The prompts of all models.
#[derive(Debug)]
pub(crate) struct Prompts {
    ram_bytes: u64,
    used: Arc<AtomicU64>,
    /// The one that was used last is the last.
    entries: Mutex<Vec<Entry>>,
    files: Option<Arc<Files>>,
    /// Held while one of them is read: one at a time, and none twice.
    reading: Mutex<()>,
    to_write: Option<Sender<Write>>,
}

#[derive(Debug)]
struct Entry {
    model: Model,
    saved: Arc<Saved>,
}

/// What a saved sequence is good for: one model, sizes of its context, a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Model(u128);

enum Write {
    /// If it still is there when its turn comes.
    Saved(Model, Weak<Saved>),
    /// Tells when all that came before is done.
    Flush(Sender<()>),
}

impl Prompts {
    pub(crate) fn new(settings: &PromptCache) -> Self {
        let enabled = settings.folder.clone().filter(|_| settings.ram_bytes > 0);
        let files = enabled.map(|folder| Arc::new(Files::new(folder, settings.folder_bytes)));
        let to_write = files.as_ref().and_then(|files| {
            let (sender, receiver) = channel();
            let files = files.clone();
            let thread = std::thread::Builder::new().name("prompts".into());
            thread.spawn(move || write(&files, &receiver)).ok().map(|_| sender)
        });
        Self {
            ram_bytes: settings.ram_bytes,
            used: Arc::default(),
            entries: Mutex::default(),
            files,
            reading: Mutex::default(),
            to_write,
        }
    }

    /// Those of a model.
    pub(crate) fn of(self: &Arc<Self>, identity: &str) -> PromptsOf {
        let model = Model(twox_hash::XxHash3_128::oneshot(identity.as_bytes()));
        PromptsOf { all: self.clone(), model }
    }

    /// Bytes of memory that they have.
    pub(crate) fn used_bytes(&self) -> u64 {
        self.used.load(Ordering::Acquire)
    }

    fn entries(&self) -> MutexGuard<'_, Vec<Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Room for so many bytes, for which those go that were not used for longest.
    fn room(&self, bytes: u64) -> Option<Room> {
        let mut entries = self.entries();
        while self.used_bytes() + bytes > self.ram_bytes {
            if entries.is_empty() || bytes > self.ram_bytes {
                return None;
            }
            entries.remove(0);
        }
        // With the lock: nobody else adds to it.
        self.used.fetch_add(bytes, Ordering::AcqRel);
        Some(Room { used: self.used.clone(), bytes })
    }
}

/// The prompts of a model.
#[derive(Debug, Clone)]
pub(crate) struct PromptsOf {
    all: Arc<Prompts>,
    model: Model,
}

impl PromptsOf {
    /// Has memory hold what files have most of a prompt, if that is more than memory has. Reads files: it is called
    /// before the model's thread is asked.
    pub(crate) fn bring(&self, prompt: &[Token]) {
        let Some(files) = &self.all.files else { return };
        let worth_reading = || {
            let in_ram = self.longest(&self.all.entries(), prompt).map_or(0, |(common, _)| common);
            files.best(self.model, prompt, in_ram + WORTH)
        };
        // Who finds nothing does not wait for what others read.
        if worth_reading().is_none() {
            return;
        }
        let _reading = self.all.reading.lock().unwrap_or_else(PoisonError::into_inner);
        // It may have been read meanwhile.
        let Some(file) = worth_reading() else { return };
        let Some(room) = self.all.room(file.state_bytes()) else { return };
        let Some((tokens, state)) = files.read(&file) else { return };
        let saved = Arc::new(Saved { tokens, state, _room: room });
        self.all.entries().push(Entry { model: self.model, saved });
    }

    /// What memory has of a prompt: more than `held` tokens, by so many that it is worth the copying, and most of
    /// them.
    pub(crate) fn best(&self, prompt: &[Token], held: usize) -> Option<Arc<Saved>> {
        let mut entries = self.all.entries();
        let (_, at) =
            self.longest(&entries, prompt).filter(|&(common, _)| common >= held + WORTH)?;
        let entry = entries.remove(at);
        let saved = entry.saved.clone();
        entries.push(entry);
        Some(saved)
    }

    /// The entry that begins with most of a prompt: how many tokens, and where it is.
    fn longest(&self, entries: &[Entry], prompt: &[Token]) -> Option<(usize, usize)> {
        let ours = entries.iter().enumerate().filter(|(_, entry)| entry.model == self.model);
        ours.map(|(at, entry)| (common(&entry.saved.tokens, prompt), at)).max()
    }

    /// Keeps a sequence of so many bytes, which `save` gives, if there is room for it. It takes the place of those
    /// that it begins with.
    pub(crate) fn keep(
        &self,
        tokens: &[Token],
        bytes: usize,
        save: impl FnOnce() -> Option<Vec<u8>>,
    ) {
        let ours = |entry: &Entry| entry.model == self.model;
        let known = |entry: &Entry| ours(entry) && entry.saved.tokens.starts_with(tokens);
        if tokens.len() < WORTH || self.all.ram_bytes < bytes as u64 {
            return;
        }
        {
            let mut entries = self.all.entries();
            if entries.iter().any(known) {
                return;
            }
            entries.retain(|entry| !ours(entry) || !tokens.starts_with(&entry.saved.tokens));
        }
        let Some(room) = self.all.room(bytes as u64) else { return };
        let Some(state) = save().filter(|state| state.len() <= bytes) else { return };
        let saved = Arc::new(Saved { tokens: tokens.to_vec(), state, _room: room });
        if let Some(to_write) = &self.all.to_write {
            drop(to_write.send(Write::Saved(self.model, Arc::downgrade(&saved))));
        }
        let mut entries = self.all.entries();
        entries
            .retain(|entry| entry.model != self.model || !tokens.starts_with(&entry.saved.tokens));
        entries.push(Entry { model: self.model, saved });
    }

    /// Waits until files have what they are to have.
    pub(crate) fn flush(&self) {
        let Some(to_write) = &self.all.to_write else { return };
        let (done, is_done) = channel();
        if to_write.send(Write::Flush(done)).is_ok() {
            // An error is its end, too.
            let _ = is_done.recv();
        }
    }
}

fn write(files: &Files, receiver: &Receiver<Write>) {
    while let Ok(next) = receiver.recv() {
        match next {
            Write::Saved(model, saved) => {
                if let Some(saved) = saved.upgrade() {
                    files.write(model, &saved.tokens, &saved.state);
                }
            }
            Write::Flush(done) => drop(done.send(())),
        }
    }
}

/// Tokens with which both begin.
pub(crate) fn common(a: &[Token], b: &[Token]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prompts(settings: &PromptCache) -> PromptsOf {
        Arc::new(Prompts::new(settings)).of("model")
    }

    fn tokens(first: Token, n: usize) -> Vec<Token> {
        (first..).take(n).collect()
    }

    fn keep(prompts: &PromptsOf, tokens: &[Token]) {
        prompts.keep(tokens, tokens.len(), || Some(vec![tokens[0].to_le_bytes()[0]; tokens.len()]));
    }

    fn found(prompts: &PromptsOf, prompt: &[Token]) -> Option<usize> {
        prompts.bring(prompt);
        prompts.best(prompt, 0).map(|saved| saved.tokens.len())
    }

    #[test]
    fn the_longest_beginning_is_found() {
        let prompts = prompts(&PromptCache { ram_bytes: 1000, ..PromptCache::default() });
        keep(&prompts, &tokens(0, 100));
        keep(&prompts, &tokens(500, 100));
        let branch = [tokens(0, 60), tokens(900, 90)].concat();
        keep(&prompts, &branch);
        assert_eq!(found(&prompts, &[branch.clone(), tokens(0, 5)].concat()), Some(150));
        assert_eq!(found(&prompts, &tokens(0, 80)), Some(100));
        assert_eq!(found(&prompts, &tokens(1, 80)), None);
        // Not for a few tokens more.
        assert!(prompts.best(&tokens(0, 80), 80 - WORTH).is_some());
        assert!(prompts.best(&tokens(0, 80), 81 - WORTH).is_none());
        // Another model's are none of ours.
        assert_eq!(found(&prompts.all.of("other"), &branch), None);
    }

    #[test]
    fn no_more_is_kept_than_there_is_room_for() {
        let prompts = prompts(&PromptCache { ram_bytes: 250, ..PromptCache::default() });
        keep(&prompts, &tokens(0, 100));
        keep(&prompts, &tokens(500, 100));
        assert_eq!(found(&prompts, &tokens(0, 100)), Some(100));
        keep(&prompts, &tokens(900, 100));
        // The one that was not used for longest has gone.
        assert_eq!(found(&prompts, &tokens(500, 100)), None);
        assert_eq!(found(&prompts, &tokens(0, 100)), Some(100));
        assert_eq!(prompts.all.used_bytes(), 200);
        keep(&prompts, &tokens(2000, 251));
        assert_eq!(found(&prompts, &tokens(2000, 251)), None);
        // What goes on takes the place of what it begins with.
        keep(&prompts, &tokens(0, 120));
        assert_eq!(found(&prompts, &tokens(0, 120)), Some(120));
        assert_eq!(prompts.all.used_bytes(), 220);
        // What somebody holds is counted until it is gone.
        let held = prompts.best(&tokens(0, 120), 0);
        keep(&prompts, &tokens(3000, 240));
        assert_eq!(found(&prompts, &tokens(3000, 240)), None);
        assert_eq!(prompts.all.used_bytes(), 120);
        drop(held);
        assert_eq!(prompts.all.used_bytes(), 0);
        keep(&prompts, &tokens(3000, 240));
        assert_eq!(found(&prompts, &tokens(3000, 240)), Some(240));
    }

    #[test]
    fn files_outlive_the_program() {
        let folder = tempfile::tempdir().expect("a folder");
        let settings = PromptCache {
            ram_bytes: 250,
            folder: Some(folder.path().join("prompts")),
            folder_bytes: 1 << 20,
        };
        let first = prompts(&settings);
        for start in [0, 500, 900] {
            keep(&first, &tokens(start, 100));
            first.flush();
        }
        // In memory there is no room for all of them.
        for start in [0, 500, 900] {
            first.bring(&tokens(start, 100));
            let saved = first.best(&tokens(start, 100), 0).expect("it is in a file");
            assert_eq!(saved.state, vec![start.to_le_bytes()[0]; 100]);
        }
        let second = prompts(&settings);
        assert_eq!(found(&second, &tokens(500, 100)), Some(100));
        assert_eq!(found(&second.all.of("other"), &tokens(500, 100)), None);
        // One that goes on, in place of what it begins with.
        keep(&second, &tokens(500, 120));
        second.flush();
        let count =
            || std::fs::read_dir(folder.path().join("prompts")).expect("it is there").count();
        assert_eq!(count(), 3);
        assert_eq!(found(&prompts(&settings), &tokens(500, 120)), Some(120));
    }

    #[test]
    fn who_finds_no_file_does_not_wait_for_those_who_read() {
        let folder = tempfile::tempdir().expect("a folder");
        let settings = PromptCache {
            ram_bytes: 1000,
            folder: Some(folder.path().into()),
            folder_bytes: 1 << 20,
        };
        let prompts = prompts(&settings);
        keep(&prompts, &tokens(0, 100));
        prompts.flush();
        let _reading = prompts.all.reading.lock();
        // It is in no file, or in memory as well.
        for start in [500, 0] {
            prompts.bring(&tokens(start, 100));
        }
    }

    #[test]
    fn nothing_is_kept_without_room() {
        let folder = tempfile::tempdir().expect("a folder");
        let settings = PromptCache { folder: Some(folder.path().into()), ..PromptCache::default() };
        let prompts = prompts(&settings);
        keep(&prompts, &tokens(0, 100));
        prompts.flush();
        assert_eq!(found(&prompts, &tokens(0, 100)), None);
        assert_eq!(std::fs::read_dir(folder.path()).expect("it is there").count(), 0);
    }
}
