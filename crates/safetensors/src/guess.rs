//! What a file that is not safetensors seems to be, so that the error can say it.

/// How many bytes from the start [`guess`] looks at.
pub(crate) const GUESS_BYTES: usize = 64;

/// A guess from up to the first 64 bytes of a file.
pub(crate) fn guess(head: &[u8]) -> &'static str {
    let starts = |prefix: &[u8]| head.starts_with(prefix);
    let text = head.trim_ascii_start();
    if starts(b"version https://git-lfs") {
        "it is a git-lfs pointer, not the file itself"
    } else if starts(b"GGUF") {
        "it is GGUF"
    } else if starts(b"PK\x03\x04") {
        "it looks like a zip archive or a PyTorch checkpoint"
    } else if matches!(head, [0x80, 2..=5, ..]) {
        "it looks like a Python pickle (an old PyTorch checkpoint)"
    } else if starts(b"\x89HDF") {
        "it looks like HDF5"
    } else if text.first() == Some(&b'<') {
        "it looks like a web page"
    } else if text.first() == Some(&b'{') {
        "it looks like JSON"
    } else if head.iter().all(|byte| *byte == 0) {
        "it begins with zeros"
    } else {
        "there is no header of JSON at its byte 8"
    }
}

/// What to do about a file that [`guess`] says this of.
pub(crate) fn hint(guess: &str) -> Option<&'static str> {
    Some(if guess.contains("git-lfs") {
        "run `git lfs pull` to fetch the real file"
    } else if guess.contains("GGUF") {
        "GGUF files are read by the crate tierstream-gguf"
    } else if guess.contains("PyTorch") {
        "convert it with safetensors.torch.save_file"
    } else if guess.contains("web page") || guess.contains("zeros") {
        "the download probably failed; fetch the file again"
    } else if guess.contains("JSON") && !guess.contains("no header") {
        "the name of an index ends in .json"
    } else {
        return None;
    })
}
