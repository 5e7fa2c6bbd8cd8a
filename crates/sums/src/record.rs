//! Records of checksums: a file for each model, in a folder of the user's cache.
//!
//! A record's name is made of two checksums: of the path of the model's (first) file, and of the headers
//! of all its files and their lengths. So the record is found again by a model of the same header at the
//! same place. A model that was moved is found by its header alone, if nothing is left where it was. One
//! that has another header than what was recorded at its place was replaced, or, if nobody has written
//! to the file since, is damaged there.
//!
//! The first line says what the file is, its version, and the checksum of the JSON that follows.

use std::fs;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use tierstream_gguf::{FileInfo, Model};

use crate::error::{Error, Result};
use crate::{Sum, date, pass, sum};

/// Of what is written, and the only one that is read.
pub(crate) const VERSION: &str = "1";

/// How a record begins.
const TITLE: &str = "tierstream checksums, version ";

/// A record's ending.
const ENDING: &str = ".sums";

/// Bytes of a record at most: some tens for each tensor and each expert's share of one.
const MAX_RECORD_BYTES: u64 = 1 << 30;

#[derive(Debug, Serialize, Deserialize)]
struct Body {
    /// Seconds since 1970.
    recorded: u64,
    files: Vec<File>,
    tensors: Vec<Tensor>,
}

/// A file of the model when it was recorded.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct File {
    /// None where it is no text.
    path: Option<String>,
    bytes: u64,
    device: Option<u64>,
    inode: Option<u64>,
    modified: Option<(i64, i64)>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Tensor {
    name: String,
    /// Hexadecimal, 16 digits each, one behind the other.
    sums: String,
}

/// What there is of a model.
pub(crate) enum Found {
    Record {
        sums: Vec<Vec<u64>>,
        recorded: SystemTime,
        path: PathBuf,
    },
    /// The record of another model, whose place this one has taken.
    Replaced,
    Nothing,
}

/// The records that a model may have.
pub(crate) struct Records<'a> {
    folder: Option<&'a Path>,
    /// Checksums, 16 digits each.
    place: String,
    header: String,
}

impl<'a> Records<'a> {
    /// Those in `folder`.
    pub(crate) fn of(model: &Model, folder: Option<&'a Path>) -> Result<Self> {
        let digits = |sum: u64| format!("{sum:016x}");
        let place = whole_path(&model.files()[0].path);
        let place = digits(sum(place.as_os_str().as_encoded_bytes()));
        Ok(Self { folder, place, header: digits(header(model)?) })
    }

    fn name(&self) -> String {
        format!("{}-{}{ENDING}", self.place, self.header)
    }

    /// Looks for what was recorded of the model.
    pub(crate) fn find(&self, model: &Model) -> Result<Found> {
        let Some(folder) = self.folder else { return Ok(Found::Nothing) };
        let own = folder.join(self.name());
        if let Some(body) = read(&own)? {
            return found(body, model, own);
        }
        let (moved, replaced) = self.others(folder)?;
        for path in moved {
            let Some(body) = read(&path)? else { continue };
            let was = body.files.first().and_then(|file| file.path.as_deref());
            if was.is_some_and(|was| !Path::new(was).exists()) {
                let found = found(body, model, path.clone())?;
                let Found::Record { sums, recorded, .. } = &found else { return Ok(found) };
                // If it cannot be written for where the model is now, it is found as it is.
                let Ok(own) = self.write(model, sums, *recorded) else { return Ok(found) };
                let _ = fs::remove_file(&path);
                return Ok(Found::Record { sums: sums.clone(), recorded: *recorded, path: own });
            }
        }
        let mut is_replaced = false;
        for path in replaced {
            let Some(body) = read(&path)? else { continue };
            if body.files == files(model) {
                let first = &model.files()[0];
                return Err(Error::Header {
                    path: first.path.clone(),
                    end: first.data_offset,
                    recorded: date(time(body.recorded)),
                    record: path,
                });
            }
            is_replaced = true;
        }
        Ok(if is_replaced { Found::Replaced } else { Found::Nothing })
    }

    /// Other records: of models with the same header, and of models at the same place.
    fn others(&self, folder: &Path) -> Result<(Vec<PathBuf>, Vec<PathBuf>)> {
        let unreadable = |source| Error::Unreadable { path: folder.to_owned(), source };
        let entries = match fs::read_dir(folder) {
            Ok(entries) => entries,
            Err(e) if is_missing(&e) => return Ok((Vec::new(), Vec::new())),
            Err(source) => return Err(unreadable(source)),
        };
        let (mut same_header, mut same_place) = (Vec::new(), Vec::new());
        for entry in entries {
            let path = entry.map_err(unreadable)?.path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            match name.strip_suffix(ENDING).and_then(|name| name.split_once('-')) {
                Some((_, header)) if header == self.header => same_header.push(path),
                Some((place, _)) if place == self.place => same_place.push(path),
                _ => {}
            }
        }
        same_header.sort_unstable();
        same_place.sort_unstable();
        Ok((same_header, same_place))
    }

    /// Records a model's checksums: all of them, or none. Gives the record's path.
    pub(crate) fn write(
        &self,
        model: &Model,
        sums: &[Vec<u64>],
        recorded: SystemTime,
    ) -> Result<PathBuf, String> {
        let folder = self.folder.ok_or("there is no cache folder (HOME is not set)")?;
        let seconds = recorded.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let tensor = |(tensor, sums): (&tierstream_gguf::Tensor, &Vec<u64>)| Tensor {
            name: tensor.name.clone(),
            sums: sums.iter().map(|sum| format!("{sum:016x}")).collect(),
        };
        let tensors = model.tensors().iter().zip(sums).map(tensor).collect();
        let body = Body { recorded: seconds, files: files(model), tensors };
        let body = serde_json::to_string_pretty(&body).map_err(|e| e.to_string())?;
        let text =
            format!("{TITLE}{VERSION}, {:016x}\n{body}\n", sum(format!("{body}\n").as_bytes()));
        let path = folder.join(self.name());
        put(folder, &path, text.as_bytes()).map_err(|e| format!("{}: {e}", path.display()))?;
        // What was recorded of another model here is of no use any more.
        for other in self.others(folder).map(|(_, replaced)| replaced).unwrap_or_default() {
            let _ = fs::remove_file(other);
        }
        Ok(path)
    }
}

/// Writes a file that is whole as soon as it has its name, and on the drive.
fn put(folder: &Path, path: &Path, bytes: &[u8]) -> io::Result<()> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    fs::create_dir_all(folder)?;
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let partial = path.with_extension(format!("{}.{count}.partial", std::process::id()));
    let written = fs::File::create(&partial).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&partial, path)
    });
    if written.is_err() {
        let _ = fs::remove_file(&partial);
    }
    written
}

/// Reads a record; `None` if it is not there.
fn read(path: &Path) -> Result<Option<Body>> {
    let damaged = |what| Error::Damaged { path: path.to_owned(), what };
    let mut text = Vec::new();
    let file = fs::File::open(path);
    match file.and_then(|file| file.take(MAX_RECORD_BYTES + 1).read_to_end(&mut text)) {
        Ok(_) if text.len() as u64 > MAX_RECORD_BYTES => return Err(damaged("it is too long")),
        Ok(_) => {}
        Err(e) if is_missing(&e) => return Ok(None),
        Err(source) => return Err(Error::Unreadable { path: path.to_owned(), source }),
    }
    let text = String::from_utf8(text).map_err(|_| damaged("it is no text"))?;
    let begins = text.strip_prefix(TITLE).and_then(|text| text.split_once('\n'));
    let (head, body) = begins.ok_or_else(|| damaged("it does not begin as one"))?;
    let (version, expected) = head.split_once(", ").unwrap_or((head, ""));
    if version != VERSION && version.len() < 10 && version.bytes().all(|b| b.is_ascii_digit()) {
        let version = version.to_owned();
        return Err(Error::Version { path: path.to_owned(), version });
    }
    if version != VERSION || expected != format!("{:016x}", sum(body.as_bytes())) {
        return Err(damaged("it does not have its own checksum"));
    }
    serde_json::from_str(body).map(Some).map_err(|_| damaged("it is no record"))
}

/// Whether nothing is there, or can be.
fn is_missing(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

/// The checksums of a record, which has to be of the same tensors as the model.
fn found(body: Body, model: &Model, path: PathBuf) -> Result<Found> {
    let other = || Error::Damaged { path: path.clone(), what: "it is of other tensors" };
    let shares = pass::shares(model)?;
    if body.tensors.len() != shares.len() {
        return Err(other());
    }
    let tensors = body.tensors.iter().zip(model.tensors()).zip(shares);
    let sums = tensors.map(|((record, tensor), shares)| {
        let sums = digits(&record.sums).filter(|sums| sums.len() == shares as usize);
        sums.filter(|_| record.name == tensor.name).ok_or_else(other)
    });
    let sums = sums.collect::<Result<_>>()?;
    Ok(Found::Record { sums, recorded: time(body.recorded), path })
}

fn digits(text: &str) -> Option<Vec<u64>> {
    let number = |digits: &[u8]| {
        let digits = std::str::from_utf8(digits).ok().filter(|digits| digits.len() == 16)?;
        u64::from_str_radix(digits, 16).ok()
    };
    text.as_bytes().chunks(16).map(number).collect()
}

fn time(seconds: u64) -> SystemTime {
    // Later ones than people write dates of are none.
    UNIX_EPOCH + Duration::from_secs(seconds.min(200_000_000_000))
}

fn files(model: &Model) -> Vec<File> {
    let file = |file: &FileInfo| File {
        path: whole_path(&file.path).to_str().map(str::to_owned),
        bytes: file.len,
        device: file.identity.map(|identity| identity.device),
        inode: file.identity.map(|identity| identity.inode),
        modified: file.identity.map(|identity| identity.modified),
    };
    model.files().iter().map(file).collect()
}

fn whole_path(path: &Path) -> PathBuf {
    path.canonicalize().unwrap_or_else(|_| path.to_owned())
}

/// Of the headers of all files, and their lengths.
fn header(model: &Model) -> Result<u64> {
    let mut sum = Sum::new();
    for file in model.files() {
        let unreadable = |source| Error::HeaderUnreadable { path: file.path.clone(), source };
        let mut bytes = Vec::new();
        let len = file.data_offset.min(file.len);
        let opened = fs::File::open(&file.path).map_err(unreadable)?;
        opened.take(len).read_to_end(&mut bytes).map_err(unreadable)?;
        sum.update(&file.len.to_le_bytes());
        sum.update(&(bytes.len() as u64).to_le_bytes());
        sum.update(&bytes);
    }
    Ok(sum.finish())
}
