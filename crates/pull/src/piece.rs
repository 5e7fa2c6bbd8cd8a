//! One piece of a file: asked for, written as it comes, and asked for again from where a connection ended.

use std::io::Read;
use std::ops::Range;

use ureq::Body;
use ureq::http::{HeaderMap, Response, StatusCode, Uri, header};

use crate::client::{self, Method, answer, text};
use crate::error::Error;
use crate::fetch::{Fetch, Job};
use crate::tries::{Failure, Tries};

/// Bytes that are read at a time.
const BUFFER_BYTES: usize = 256 << 10;

/// What one connection brings.
#[derive(Debug)]
struct Piece {
    /// What lacks of it.
    range: Range<u64>,
    /// All of a file whose server sends no pieces: from the beginning, each time.
    is_whole: bool,
    /// The furthest that was come.
    furthest: u64,
}

/// Fetches a range, or all of the file where its server does not send ranges.
pub(crate) fn fetch(fetch: &Fetch<'_>, index: usize, range: Range<u64>) -> Result<(), Error> {
    let job = &fetch.jobs[index];
    let mut tries = Tries::new(fetch.options.tries, fetch.options.first_wait);
    let mut buffer = vec![0; BUFFER_BYTES];
    let mut piece = Piece { furthest: range.start, range, is_whole: false };
    while !piece.range.is_empty() {
        let before = piece.furthest;
        let failure = match attempt(fetch, index, &mut piece, &mut buffer) {
            Ok(()) => continue,
            Err(failure) => failure,
        };
        if fetch.is_stopped() {
            return Err(Error::Cancelled);
        }
        if piece.furthest > before {
            tries.reset();
        }
        // It may be that the address is no longer valid.
        job.forget_address();
        let (wait, error) = tries.next(failure)?;
        fetch.pause(wait, &error)?;
    }
    Ok(())
}

/// One request. What has come is taken off the piece.
fn attempt(
    fetch: &Fetch<'_>,
    index: usize,
    piece: &mut Piece,
    buffer: &mut [u8],
) -> Result<(), Failure> {
    let job = &fetch.jobs[index];
    let address = job.address();
    let asked = Some(&piece.range);
    let (mut response, from) = fetch.client.send(Method::Get, &address, asked, true)?;
    match response.status() {
        StatusCode::PARTIAL_CONTENT => {
            check_range(job, response.headers(), &piece.range, &from)?;
        }
        StatusCode::OK => {
            check_length(job, &response, &from)?;
            let all = 0..job.remote.bytes;
            if !piece.is_whole && piece.range != all {
                if !fetch.take_whole(index) {
                    // Another connection brings all of it.
                    piece.range.start = piece.range.end;
                    return Ok(());
                }
                piece.furthest = 0;
            }
            (piece.range, piece.is_whole) = (all, true);
        }
        // Signed addresses are valid for a time.
        StatusCode::FORBIDDEN | StatusCode::NOT_FOUND | StatusCode::GONE
            if from != job.remote.uri =>
        {
            return Err(client::passing(&from, format!("it answered {}", response.status())));
        }
        _ => return Err(client::refused(&from, &response, fetch.repo_name)),
    }
    job.remember_address(from.clone());
    let mut body = response.body_mut().as_reader();
    while !piece.range.is_empty() {
        let left = piece.range.end - piece.range.start;
        let room = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
        let read = body.read(&mut buffer[..room]).map_err(|error| client::broken(&from, &error))?;
        if read == 0 {
            return Err(client::passing(&from, "the connection was cut".to_owned()));
        }
        if fetch.is_stopped() {
            return Err(Error::Cancelled.into());
        }
        let at = piece.range.start;
        job.partial.write(&buffer[..read], at)?;
        piece.range.start = at + read as u64;
        piece.furthest = piece.furthest.max(piece.range.start);
        fetch.came(index, at..piece.range.start);
    }
    Ok(())
}

/// Whether the bytes are those that were asked for.
fn check_range(
    job: &Job,
    headers: &HeaderMap,
    piece: &Range<u64>,
    from: &Uri,
) -> Result<(), Failure> {
    let told = text(headers, header::CONTENT_RANGE.as_str()).unwrap_or_default();
    let expected = format!("bytes {}-{}/{}", piece.start, piece.end - 1, job.remote.bytes);
    // The size may be left open.
    let open = format!("bytes {}-{}/*", piece.start, piece.end - 1);
    if told == expected || told == open {
        return Ok(());
    }
    let told: String = told.chars().take(100).collect();
    let what = format!("with {told:?} of {}, instead of {expected:?}", job.remote.path);
    Err(answer(from, what).into())
}

/// Whether the answer has as many bytes as the file, as far as it tells.
fn check_length(job: &Job, response: &Response<Body>, from: &Uri) -> Result<(), Failure> {
    match response.body().content_length() {
        Some(bytes) if bytes != job.remote.bytes => {
            let (path, expected) = (&job.remote.path, job.remote.bytes);
            Err(answer(from, format!("with {bytes} bytes of {path}, which has {expected}")).into())
        }
        _ => Ok(()),
    }
}
