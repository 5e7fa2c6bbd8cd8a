//! How likely the tokens of an answer were, and others in their places. They are kept as numbers, and are texts when
//! they are told: as JSON they take many times as much.

use std::sync::Arc;

use serde::{Serialize, Serializer};

use crate::engine::{Text, Token};

/// A token, and the natural logarithm of its probability.
pub(crate) type Likely = (Token, f32);

/// Of each token that was drawn, how likely it was, and the likeliest ones: as many with each.
#[derive(Debug, Default)]
pub(crate) struct Logprobs {
    /// A token that was drawn, then the likeliest ones.
    all: Vec<Likely>,
    /// Entries for each that was drawn.
    each: usize,
}

impl Logprobs {
    pub(crate) fn push(&mut self, drawn: Likely, likeliest: &[Likely]) {
        self.all.push(drawn);
        self.all.extend(likeliest);
        self.each = 1 + likeliest.len();
    }

    /// Moves all of the others behind these, which are of the same answer.
    pub(crate) fn append(&mut self, others: &mut Self) {
        self.all.append(&mut others.all);
        self.each = self.each.max(others.each);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    fn rows(&self) -> impl Iterator<Item = (Likely, &[Likely])> {
        self.all.chunks_exact(self.each.max(1)).map(|row| (row[0], &row[1..]))
    }
}

/// These with what makes texts of them.
pub(crate) struct Told {
    logprobs: Logprobs,
    text: Arc<dyn Text>,
    /// Control tokens whose names are part of the answer's text.
    marks: Arc<[Token]>,
}

/// A token as OpenAI's chats and Ollama tell it.
#[derive(Serialize)]
struct Entry {
    token: String,
    logprob: f64,
    bytes: Vec<u8>,
    #[serde(skip_serializing_if = "Option::is_none")]
    top_logprobs: Option<Vec<Entry>>,
}

impl Told {
    pub(crate) fn new(logprobs: Logprobs, text: Arc<dyn Text>, marks: Arc<[Token]>) -> Self {
        Self { logprobs, text, marks }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.logprobs.is_empty()
    }

    /// The tokens that were drawn: their bytes, and the logarithms.
    pub(crate) fn drawn(&self) -> impl Iterator<Item = (Vec<u8>, f64)> {
        self.logprobs.rows().map(|(drawn, _)| self.drawn_one(drawn))
    }

    /// With each of these, the likeliest ones.
    pub(crate) fn likeliest(&self) -> impl Iterator<Item = impl Iterator<Item = (Vec<u8>, f64)>> {
        self.logprobs.rows().map(|(_, others)| self.others(others))
    }

    /// Writes a list of the tokens. `always`: each has a list of the likeliest ones, also of none.
    pub(crate) fn list<S: Serializer>(&self, to: S, always: bool) -> Result<S::Ok, S::Error> {
        let entry = |(bytes, logprob): (Vec<u8>, f64), top_logprobs| {
            let token = String::from_utf8_lossy(&bytes).into_owned();
            Entry { token, logprob, bytes, top_logprobs }
        };
        to.collect_seq(self.logprobs.rows().map(|(drawn, others)| {
            let likeliest = || self.others(others).map(|one| entry(one, None)).collect();
            entry(self.drawn_one(drawn), (always || !others.is_empty()).then(likeliest))
        }))
    }

    fn drawn_one(&self, (token, logprob): Likely) -> (Vec<u8>, f64) {
        (self.text.piece(token, self.marks.contains(&token)), logprob.into())
    }

    fn others(&self, others: &[Likely]) -> impl Iterator<Item = (Vec<u8>, f64)> {
        others.iter().map(|&(token, logprob)| (self.text.piece(token, true), logprob.into()))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::engine::EngineError;

    /// Each token has these bytes.
    struct Half;

    impl Text for Half {
        fn tokenize(&self, _: &str, _: bool, _: bool) -> Result<Vec<Token>, EngineError> {
            Ok(Vec::new())
        }

        fn piece(&self, token: Token, markup: bool) -> Vec<u8> {
            match token {
                0 if markup => b"<0>".to_vec(),
                0 => Vec::new(),
                _ => vec![0xc3],
            }
        }

        fn is_end(&self, _: Token) -> bool {
            false
        }

        fn bos_eos(&self) -> (String, String) {
            Default::default()
        }

        fn len(&self) -> usize {
            2
        }
    }

    /// As JSON with texts, a candidate would take a hundred bytes and more.
    #[test]
    fn a_candidate_takes_eight_bytes() {
        let mut all = Logprobs::default();
        for token in 0..1000 {
            let mut one = Logprobs::default();
            one.push((token, -1.0), &[(token, -1.0); 20]);
            all.append(&mut one);
        }
        assert_eq!((all.rows().count(), all.all.len()), (1000, 21_000));
        assert!(all.all.capacity() * size_of::<Likely>() <= 2 * 21_000 * 8);
    }

    #[test]
    fn tokens_are_told_with_their_bytes() {
        struct List(Told, bool);

        impl Serialize for List {
            fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
                self.0.list(to, self.1)
            }
        }

        let list = |likeliest: &[Likely], marks: &[Token], always| {
            let mut all = Logprobs::default();
            all.push((0, -0.5), likeliest);
            let list = List(Told::new(all, Arc::new(Half), marks.into()), always);
            serde_json::to_value(list).expect("JSON")
        };
        let marked = json!({"token": "<0>", "logprob": -0.5, "bytes": [60, 48, 62]});
        let half = json!({"token": "\u{fffd}", "logprob": -1.5, "bytes": [0xc3]});
        let mut whole = marked.clone();
        whole["top_logprobs"] = json!([marked, half]);
        assert_eq!(list(&[(0, -0.5), (1, -1.5)], &[0], false), json!([whole]));
        assert_eq!(list(&[], &[0], false), json!([marked]));
        let unmarked = json!({"token": "", "logprob": -0.5, "bytes": [], "top_logprobs": []});
        assert_eq!(list(&[], &[], true), json!([unmarked]));
    }
}
