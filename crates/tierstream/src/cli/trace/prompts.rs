//! What a model is to answer or to read while its routing is recorded: files and folders of texts.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use serde::Deserialize;

use crate::cli::output::Failure;

/// Bytes of all texts together.
const BYTES_MAX: u64 = 256 << 20;

/// One prompt, or one text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Item {
    pub(super) text: String,
    pub(super) domain: String,
    /// Where it is from, for messages.
    pub(super) from: String,
}

/// A line of a `.jsonl`.
#[derive(Deserialize)]
struct Line {
    #[serde(alias = "text")]
    prompt: String,
    #[serde(default)]
    domain: Option<String>,
}

/// Reads what is in a file or a folder. `by_line`: each line of a file is one.
pub(super) fn read(path: &Path, by_line: bool, domain: Option<&str>) -> anyhow::Result<Vec<Item>> {
    let mut items = Vec::new();
    let mut left = BYTES_MAX;
    let is_folder = fs::metadata(path).with_context(|| cannot_read(path))?.is_dir();
    let files = if is_folder { files_in(path)? } else { vec![(path.to_owned(), None)] };
    for (file, folder) in files {
        let bytes = fs::metadata(&file).with_context(|| cannot_read(&file))?.len();
        left = left.checked_sub(bytes).ok_or_else(|| {
            let message = format!("{}: more than {} MiB of texts", path.display(), BYTES_MAX >> 20);
            Failure::error(message, "a million tokens tell enough of a model")
        })?;
        let text = fs::read_to_string(&file).with_context(|| cannot_read(&file))?;
        let stem = file.file_stem().map(|stem| stem.to_string_lossy().into_owned());
        let domain = domain.map(str::to_owned).or(folder).or(stem).unwrap_or_default();
        if file.extension().is_some_and(|extension| extension == "jsonl") {
            from_json(&file, &text, &domain, &mut items)?;
        } else if by_line && !is_folder {
            from_lines(&file, &text, &domain, &mut items);
        } else if !text.trim().is_empty() {
            items.push(Item { text, domain, from: file.display().to_string() });
        }
    }
    if items.is_empty() {
        let message = format!("{}: there is no text in it", path.display());
        return Err(Failure::error(message, "`tierstream trace --help` tells what it takes"));
    }
    Ok(items)
}

fn from_lines(file: &Path, text: &str, domain: &str, items: &mut Vec<Item>) {
    for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let from = format!("{}: line {}", file.display(), number + 1);
        items.push(Item { text: line.to_owned(), domain: domain.to_owned(), from });
    }
}

fn from_json(file: &Path, text: &str, domain: &str, items: &mut Vec<Item>) -> anyhow::Result<()> {
    for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let from = format!("{}: line {}", file.display(), number + 1);
        let line: Line = serde_json::from_str(line).map_err(|error| {
            let hint =
                "a line is {\"prompt\": \"...\", \"domain\": \"...\"}, the latter if there is one; `text` is the same";
            Failure::error(format!("{from}: {error}"), hint)
        })?;
        let domain = line.domain.unwrap_or_else(|| domain.to_owned());
        items.push(Item { text: line.prompt, domain, from });
    }
    Ok(())
}

/// The files of a folder and of the folders in it, with the name of the latter, by name.
fn files_in(folder: &Path) -> anyhow::Result<Vec<(PathBuf, Option<String>)>> {
    let entries = |folder: &Path| -> anyhow::Result<Vec<PathBuf>> {
        let read = fs::read_dir(folder).with_context(|| cannot_read(folder))?;
        let mut paths = read
            .map(|entry| Ok(entry?.path()))
            .collect::<std::io::Result<Vec<_>>>()
            .with_context(|| cannot_read(folder))?;
        paths.retain(|path| !name(path).starts_with('.'));
        paths.sort_unstable();
        Ok(paths)
    };
    let mut files = Vec::new();
    for path in entries(folder)? {
        if path.is_dir() {
            let inner = entries(&path)?.into_iter().filter(|inner| inner.is_file());
            files.extend(inner.map(|file| (file, Some(name(&path)))));
        } else {
            files.push((path, None));
        }
    }
    Ok(files)
}

fn name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn cannot_read(path: &Path) -> String {
    format!("cannot read {}", path.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(items: &[Item]) -> Vec<(&str, &str)> {
        items.iter().map(|item| (item.text.as_str(), item.domain.as_str())).collect()
    }

    #[test]
    fn lines_objects_and_folders() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, text).unwrap();
            path
        };
        let lines = write("chat.txt", "Hello\n\nHow are you?\r\n");
        assert_eq!(
            texts(&read(&lines, true, None).unwrap()),
            [("Hello", "chat"), ("How are you?", "chat")]
        );
        assert_eq!(
            texts(&read(&lines, false, Some("x")).unwrap()),
            [("Hello\n\nHow are you?\r\n", "x")]
        );
        let objects =
            write("b.jsonl", "{\"prompt\":\"1+1\",\"domain\":\"maths\"}\n{\"text\":\"a\\nb\"}\n");
        assert_eq!(texts(&read(&objects, true, None).unwrap()), [("1+1", "maths"), ("a\nb", "b")]);
        write("code/z.rs", "fn main() {}");
        write("code/a.rs", "struct A;");
        write("code/deeper/a.rs", "not read");
        write(".hidden", "not read");
        write("empty.txt", "\n");
        let all = read(dir.path(), true, None).unwrap();
        let expected = [
            ("1+1", "maths"),
            ("a\nb", "b"),
            ("Hello\n\nHow are you?\r\n", "chat"),
            ("struct A;", "code"),
            ("fn main() {}", "code"),
        ];
        assert_eq!(texts(&all), expected);
    }

    #[test]
    fn what_cannot_be_used_is_told_with_its_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.jsonl");
        fs::write(&path, "{\"prompt\":\"x\"}\n{\"query\":\"y\"}\n").unwrap();
        let error = format!("{:#}", read(&path, true, None).unwrap_err());
        assert!(error.contains("a.jsonl: line 2: missing field `prompt`"), "{error}");
        fs::write(&path, "\n").unwrap();
        assert!(format!("{:#}", read(&path, true, None).unwrap_err()).contains("no text in it"));
        assert!(read(&dir.path().join("none"), true, None).is_err());
    }
}
