//! Bytes of tokens to text: whole characters, nothing from a text on at which an answer ends.

/// Collects the pieces of an answer.
#[derive(Debug)]
pub(crate) struct Texts {
    stops: Vec<String>,
    /// Bytes that are no whole character yet.
    bytes: Vec<u8>,
    /// Text that may be the beginning of a stop text.
    held: String,
    ready: String,
    /// The text that ended it.
    stopped_at: Option<String>,
}

impl Texts {
    pub(crate) fn new(stops: &[String]) -> Self {
        let stops = stops.iter().filter(|stop| !stop.is_empty()).cloned().collect();
        let (bytes, held, ready) = (Vec::new(), String::new(), String::new());
        Self { stops, bytes, held, ready, stopped_at: None }
    }

    /// Adds a piece; true if a stop text has come, before which the answer ends.
    pub(crate) fn push(&mut self, piece: &[u8]) -> bool {
        self.bytes.extend_from_slice(piece);
        let mut rest = std::mem::take(&mut self.bytes);
        loop {
            match std::str::from_utf8(&rest) {
                Ok(text) => {
                    self.held.push_str(text);
                    break;
                }
                Err(error) => {
                    let valid = error.valid_up_to();
                    self.held.push_str(&String::from_utf8_lossy(&rest[..valid]));
                    match error.error_len() {
                        Some(bad) => {
                            self.held.push(char::REPLACEMENT_CHARACTER);
                            rest.drain(..valid + bad);
                        }
                        None => {
                            self.bytes = rest.split_off(valid);
                            break;
                        }
                    }
                }
            }
        }
        self.release()
    }

    fn release(&mut self) -> bool {
        if self.stopped_at.is_some() {
            self.held.clear();
            return true;
        }
        let found = self.stops.iter().filter_map(|stop| Some((self.held.find(stop)?, stop)));
        if let Some((at, stop)) = found.min() {
            self.ready.push_str(&self.held[..at]);
            self.stopped_at = Some(stop.clone());
            self.held.clear();
            return true;
        }
        let may_begin = |&at: &usize| {
            let tail = &self.held[at..];
            self.stops.iter().any(|stop| stop.starts_with(tail))
        };
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0);
        let first = self.held.len().saturating_sub(longest);
        let boundaries = (first..self.held.len()).filter(|&at| self.held.is_char_boundary(at));
        let keep = boundaries.into_iter().find(may_begin).unwrap_or(self.held.len());
        self.ready.extend(self.held.drain(..keep));
        false
    }

    /// The answer is over: nothing is held any more.
    pub(crate) fn finish(&mut self) {
        if self.stopped_at.is_none() {
            let held = std::mem::take(&mut self.held);
            self.ready.push_str(&held);
            if !self.bytes.is_empty() {
                self.bytes.clear();
                self.ready.push(char::REPLACEMENT_CHARACTER);
            }
        }
    }

    /// The text that ended it, if one did.
    pub(crate) fn stopped_at(&self) -> Option<&str> {
        self.stopped_at.as_deref()
    }

    /// What can be handed on.
    pub(crate) fn take(&mut self) -> String {
        std::mem::take(&mut self.ready)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::Texts;

    fn collect(text: &[u8], cuts: &[usize], stops: &[String]) -> String {
        let mut texts = Texts::new(stops);
        let (mut out, mut from) = (String::new(), 0);
        for &cut in cuts.iter().chain([&text.len()]) {
            let to = cut.clamp(from, text.len());
            let stopped = texts.push(&text[from..to]);
            out += &texts.take();
            from = to;
            if stopped {
                break;
            }
        }
        texts.finish();
        out + &texts.take()
    }

    proptest! {
        #[test]
        fn pieces_of_any_size_give_the_text_before_the_first_stop(
            text in "[ab\u{e4}\u{20ac}]{0,30}",
            cuts in proptest::collection::vec(0usize..60, 0..20),
            stops in proptest::collection::vec("[ab\u{e4}]{1,3}", 0..3),
        ) {
            let mut cuts = cuts;
            cuts.sort_unstable();
            // A stop is seen when it has come, so the one that ends first counts.
            let ends = stops.iter().filter_map(|stop| Some(text.find(stop)? + stop.len())).min();
            let seen = ends.map_or(&text[..], |end| &text[..end]);
            let at = stops.iter().filter_map(|stop| seen.find(stop)).min();
            let got = collect(text.as_bytes(), &cuts, &stops);
            let bound = at.unwrap_or(text.len());
            prop_assert!(text.starts_with(&got));
            // Of two that overlap, the one that begins first counts if both have come at once.
            let first = stops.iter().filter_map(|stop| text.find(stop)).min();
            prop_assert!((first.unwrap_or(bound)..=bound).contains(&got.len()));
            prop_assert!(stops.iter().all(|stop| !got.contains(stop)));
            if stops.len() < 2 {
                prop_assert_eq!(got, &text[..bound]);
            }
        }
    }

    #[test]
    fn what_is_no_text_is_replaced() {
        assert_eq!(collect(b"a\xffb\xe2\x82", &[1, 2, 3], &[]), "a\u{fffd}b\u{fffd}");
    }
}
