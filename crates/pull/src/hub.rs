//! What the hub tells of a repository and of its files.

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Deserialize;
use tierstream_store::HubName;
use ureq::http::{StatusCode, Uri, header};

use crate::client::{self, Client, Method, answer, text};
use crate::error::Result;
use crate::limits;
use crate::tries::Failure;

/// The revision that is fetched.
pub(crate) const REVISION: &str = "main";

/// What a path may have as it is.
const PLAIN: &AsciiSet =
    &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~').remove(b'/');

/// A repository at one commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Listing {
    /// 40 digits.
    pub(crate) commit: String,
    /// Names of files, below the repository.
    pub(crate) files: Vec<String>,
}

/// A file of a repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Remote {
    pub(crate) path: String,
    pub(crate) uri: Uri,
    /// 64 digits, in lower case. The cache names the file's content by it.
    pub(crate) sha256: String,
    pub(crate) bytes: u64,
}

#[derive(Debug, Deserialize)]
struct Answer {
    sha: String,
    #[serde(default)]
    siblings: Vec<Sibling>,
}

#[derive(Debug, Deserialize)]
struct Sibling {
    rfilename: String,
}

/// The files of a repository.
pub(crate) fn listing(client: &Client, name: &HubName) -> Result<Listing, Failure> {
    let repo = format!("{}/{}", name.owner(), name.repo());
    let uri = client.at(&format!("/api/models/{repo}/revision/{REVISION}"))?;
    let (mut response, uri) = client.send(Method::Get, &uri, None, false)?;
    if response.status() != StatusCode::OK {
        return Err(client::refused(&uri, &response, &repo));
    }
    let body = response.body_mut().with_config().limit(limits::MAX_LISTING_BYTES);
    let bytes = body.read_to_vec().map_err(|error| match error {
        ureq::Error::BodyExceedsLimit(limit) => {
            answer(&uri, format!("with a list of more than {limit} bytes")).into()
        }
        error => client::failed(&uri, error),
    })?;
    parse(&bytes).map_err(|what| answer(&uri, what).into())
}

fn parse(bytes: &[u8]) -> Result<Listing, String> {
    let answer: Answer = serde_json::from_slice(bytes)
        .map_err(|error| format!("with what is no list of a repository: {error}"))?;
    if answer.sha.len() != 40 || !is_hex(&answer.sha) {
        return Err("with a repository that has no commit".to_owned());
    }
    if answer.siblings.len() > limits::MAX_FILES {
        return Err(format!("with more than {} files", limits::MAX_FILES));
    }
    let files: Vec<String> = answer.siblings.into_iter().map(|file| file.rfilename).collect();
    if let Some(path) = files.iter().find(|path| !is_path(path)) {
        let shown: String = path.chars().take(100).collect();
        return Err(format!("with a file of the name {shown:?}"));
    }
    Ok(Listing { commit: answer.sha.to_ascii_lowercase(), files })
}

/// Whether it is a name below a folder, on any system, that leads nowhere else.
fn is_path(path: &str) -> bool {
    let is_part = |part: &str| {
        !matches!(part, "" | "." | "..")
            && part.len() <= limits::MAX_PATH_PART_BYTES
            && !part.chars().any(|c| c.is_control() || matches!(c, '\\' | ':'))
    };
    path.len() <= limits::MAX_PATH_BYTES && path.split('/').all(is_part)
}

/// What the hub tells of a file: who has its content, and what it is.
pub(crate) fn remote(
    client: &Client,
    name: &HubName,
    commit: &str,
    path: &str,
) -> Result<Remote, Failure> {
    let repo = format!("{}/{}", name.owner(), name.repo());
    let encoded = utf8_percent_encode(path, PLAIN);
    let uri = client.at(&format!("/{repo}/resolve/{commit}/{encoded}"))?;
    let (response, from) = client.send(Method::Head, &uri, None, false)?;
    let (status, headers) = (response.status(), response.headers());
    if !status.is_success() && !status.is_redirection() {
        return Err(client::refused(&from, &response, &repo));
    }
    let wrong = |what: &str| -> Failure { answer(&from, format!("{what} of {path}")).into() };
    if text(headers, "x-repo-commit").is_some_and(|other| other != commit) {
        return Err(wrong("with another commit"));
    }
    let linked = text(headers, "x-linked-etag").or_else(|| text(headers, header::ETAG.as_str()));
    let sha256 = linked.and_then(sha256).ok_or_else(|| wrong("without the SHA-256"))?;
    let bytes = text(headers, "x-linked-size").or_else(|| {
        // Of a redirect it is the length of its own text.
        text(headers, header::CONTENT_LENGTH.as_str()).filter(|_| status.is_success())
    });
    let bytes = bytes.and_then(|text| text.parse().ok());
    let bytes = bytes.filter(|bytes| (1..=limits::MAX_FILE_BYTES).contains(bytes));
    let bytes = bytes.ok_or_else(|| wrong("without a size, or with one that cannot be,"))?;
    Ok(Remote { path: path.to_owned(), uri, sha256, bytes })
}

/// The checksum that an entity tag is, of a large file.
fn sha256(etag: &str) -> Option<String> {
    let tag = etag.strip_prefix("W/").unwrap_or(etag).trim_matches('"');
    (tag.len() == 64 && is_hex(tag)).then(|| tag.to_ascii_lowercase())
}

fn is_hex(text: &str) -> bool {
    text.bytes().all(|b| b.is_ascii_hexdigit())
}

#[cfg(test)]
mod tests {
    use super::*;

    const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

    fn listing_of(path: &str) -> Result<Listing, String> {
        let file = serde_json::json!({ "rfilename": path });
        parse(serde_json::json!({ "sha": COMMIT, "siblings": [file] }).to_string().as_bytes())
    }

    #[test]
    fn listings_are_read() {
        let listing = listing_of("d/m.gguf").unwrap();
        assert_eq!(listing, Listing { commit: COMMIT.into(), files: vec!["d/m.gguf".into()] });
        for other in ["", "{}", "[]", r#"{"sha":"x"}"#, r#"{"sha":7}"#, "<html>"] {
            assert!(parse(other.as_bytes()).is_err(), "{other}");
        }
        let long = format!("{}.gguf", "a".repeat(255));
        for path in
            ["../x", "a/../x", "/etc/passwd", "a//b", "", ".", "a\0b", "a\\..\\b", "C:x", &long]
        {
            assert!(listing_of(path).is_err(), "{path}");
        }
    }

    #[test]
    fn tags_of_large_files_are_checksums() {
        let digits = "aB".repeat(32);
        for tag in [format!("\"{digits}\""), digits.clone(), format!("W/\"{digits}\"")] {
            assert_eq!(sha256(&tag), Some("ab".repeat(32)), "{tag}");
        }
        for tag in [&digits[1..], &"ab".repeat(20), "", &format!("../{}", &digits[3..])] {
            assert_eq!(sha256(tag), None, "{tag}");
        }
    }
}
