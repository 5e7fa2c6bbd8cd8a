//! Ollama's blobs: files that are named after the SHA-256 of what is in them.

use std::path::Path;

/// The SHA-256 that a file's name says, if it is that of a blob: `sha256-` and 64 hexadecimal digits.
pub fn blob_sha256(path: &Path) -> Option<[u8; 32]> {
    // Ollama links models to their blobs at times; what a link is named does not matter.
    let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let digits = path.file_name()?.to_str()?.strip_prefix("sha256-")?;
    if digits.len() != 64 || !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    let mut sum = [0; 32];
    for (byte, at) in sum.iter_mut().zip((0..64).step_by(2)) {
        *byte = u8::from_str_radix(&digits[at..at + 2], 16).ok()?;
    }
    Some(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blobs_are_known_by_their_names() {
        let name = format!("/models/blobs/sha256-{}0f", "Ab".repeat(31));
        let sum = blob_sha256(Path::new(&name)).unwrap();
        assert_eq!((sum[0], sum[30], sum[31]), (0xab, 0xab, 0x0f));
        let short = format!("sha256-{}", "a".repeat(63));
        for other in ["model.gguf", "sha256-", &short, &format!("{short}g"), &format!("{short}aa")]
        {
            assert_eq!(blob_sha256(Path::new(other)), None, "{other}");
        }
    }
}
