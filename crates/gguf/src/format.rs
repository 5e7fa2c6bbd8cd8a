//! What a file that is not GGUF seems to be, so that the error can say it.

use std::fmt;

/// A guess from a file's first bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Format {
    /// Hugging Face safetensors.
    Safetensors,
    /// A zip archive, which is also what `torch.save` writes.
    Zip,
    /// A Python pickle, as old PyTorch checkpoints are.
    Pickle,
    /// A ggml file from before GGUF (GGML, GGMF, GGJT, GGLA).
    OldGgml,
    /// HDF5, as Keras saves.
    Hdf5,
    /// A gzip, zstd, xz, bzip2 or 7z archive.
    Compressed,
    /// A git-lfs pointer: the small text that stands for a file that was not fetched.
    GitLfsPointer,
    /// A web page, as a failed download leaves.
    Html,
    /// JSON text.
    Json,
    /// Zeros only, as an unfinished download into preallocated space leaves.
    Zeros,
    /// Nothing known; the first four bytes (zero-filled if the file is shorter).
    Unknown([u8; 4]),
}

/// How many bytes from the start [`Format::guess`] looks at.
pub(crate) const GUESS_BYTES: usize = 64;

impl Format {
    /// Guesses from up to the first 64 bytes of a file.
    pub(crate) fn guess(head: &[u8]) -> Self {
        const COMPRESSED: &[&[u8]] =
            &[b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ", b"BZh", b"7z\xbc\xaf"];
        let text = head.trim_ascii_start();
        let starts = |prefix: &[u8]| head.starts_with(prefix);
        if starts(b"PK\x03\x04") {
            Self::Zip
        } else if [b"lmgg", b"fmgg", b"tjgg", b"algg"].iter().any(|magic| starts(*magic)) {
            Self::OldGgml
        } else if starts(b"\x89HDF") {
            Self::Hdf5
        } else if COMPRESSED.iter().any(|magic| starts(magic)) {
            Self::Compressed
        } else if starts(b"version https://git-lfs") {
            Self::GitLfsPointer
        } else if text.first() == Some(&b'<') {
            Self::Html
        } else if head.get(8) == Some(&b'{') && head[4..8] == [0; 4] {
            // An 8-byte little-endian length, then a JSON object of that length.
            Self::Safetensors
        } else if text.first() == Some(&b'{') {
            Self::Json
        } else if matches!(head, [0x80, 2..=5, ..]) {
            Self::Pickle
        } else if !head.is_empty() && head.iter().all(|byte| *byte == 0) {
            Self::Zeros
        } else {
            let mut first = [0; 4];
            let present = head.len().min(4);
            first[..present].copy_from_slice(&head[..present]);
            Self::Unknown(first)
        }
    }

    /// What the user can do about it, where there is something.
    pub(crate) fn hint(self) -> Option<&'static str> {
        Some(match self {
            Self::Safetensors | Self::Zip | Self::Pickle | Self::Hdf5 => {
                "convert the model with llama.cpp's convert_hf_to_gguf.py, or download it as GGUF"
            }
            Self::OldGgml => {
                "convert it again from the original model; llama.cpp no longer reads it either"
            }
            Self::Compressed => "unpack it first",
            Self::GitLfsPointer => "run `git lfs pull` to fetch the real file",
            Self::Html | Self::Json => "the download probably failed; fetch the file again",
            Self::Zeros => "the download is probably unfinished; fetch the file again",
            Self::Unknown(_) => return None,
        })
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Safetensors => f.write_str("it looks like safetensors"),
            Self::Zip => f.write_str("it looks like a zip archive or a PyTorch checkpoint"),
            Self::Pickle => {
                f.write_str("it looks like a Python pickle (an old PyTorch checkpoint)")
            }
            Self::OldGgml => f.write_str("it is a ggml file from before GGUF"),
            Self::Hdf5 => f.write_str("it looks like HDF5"),
            Self::Compressed => f.write_str("it is compressed"),
            Self::GitLfsPointer => f.write_str("it is a git-lfs pointer, not the file itself"),
            Self::Html => f.write_str("it looks like a web page"),
            Self::Json => f.write_str("it looks like JSON"),
            Self::Zeros => f.write_str("it begins with zeros"),
            Self::Unknown(first) => {
                write!(f, "it begins with \"{}\", not \"GGUF\"", first.escape_ascii())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guesses() {
        for (head, expected) in [
            (&b"PK\x03\x04\x14\0"[..], Format::Zip),
            (b"\x40\x12\0\0\0\0\0\0{\"__metadata__\"", Format::Safetensors),
            (b"\x80\x02\x8a\nl\xfc", Format::Pickle),
            (b"lmgg\x01\0\0\0", Format::OldGgml),
            (b"tjgg\x03\0\0\0", Format::OldGgml),
            (b"\x89HDF\r\n\x1a\n", Format::Hdf5),
            (b"\x1f\x8b\x08", Format::Compressed),
            (b"version https://git-lfs.github.com/spec/v1", Format::GitLfsPointer),
            (b"\n<!DOCTYPE html>", Format::Html),
            (b"{\"error\":\"not found\"}", Format::Json),
            (&[0; 64], Format::Zeros),
            (b"hi", Format::Unknown(*b"hi\0\0")),
            (b"", Format::Unknown([0; 4])),
        ] {
            assert_eq!(Format::guess(head), expected, "{head:?}");
        }
    }
}
