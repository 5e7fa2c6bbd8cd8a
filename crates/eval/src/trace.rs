//! Which experts the tokens of a run were routed to.

use std::collections::HashMap;

use crate::error::{Error, Place, Result};
use crate::header::Header;
use crate::limits;

/// Fills the places of a token's row for which a layer has no expert: they come last in the layer.
pub const NO_EXPERT: u16 = u16::MAX;

/// How a token was computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Phase {
    /// As part of a prompt, or of a text that was given.
    Prefill,
    /// After the one before it was drawn.
    Decode,
}

impl Phase {
    /// As it is called in files.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Prefill => "prefill",
            Self::Decode => "decode",
        }
    }
}

/// One token, without its experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Token {
    /// Which prompt it belongs to: windows and next tokens do not reach into another one.
    pub prompt: u32,
    /// Position in the context.
    pub position: u32,
    /// Tokens with the same number were computed together: each of their experts is brought once.
    pub batch: u32,
    /// Id in the model's vocabulary.
    pub id: Option<u32>,
    /// Whether it was decoded.
    pub phase: Phase,
    /// Which of [`Domains`] it belongs to.
    pub domain: u16,
}

/// Tags of what the prompts are about. The first one, 0, is empty: nothing is known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Domains {
    names: Vec<String>,
    numbers: HashMap<String, u16>,
}

impl Default for Domains {
    fn default() -> Self {
        Self { names: vec![String::new()], numbers: HashMap::from([(String::new(), 0)]) }
    }
}

impl Domains {
    /// The number of a tag, which is new if it was not there.
    ///
    /// # Errors
    ///
    /// If the tag is longer than [`limits::TAG_BYTES_MAX`], or there are more than
    /// [`limits::DOMAINS_MAX`].
    pub fn number(&mut self, name: &str) -> Result<u16> {
        if let Some(&number) = self.numbers.get(name) {
            return Ok(number);
        }
        Error::limit("bytes of a domain", name.len() as u64, limits::TAG_BYTES_MAX as u64)?;
        Error::limit("domains", self.names.len() as u64 + 1, limits::DOMAINS_MAX as u64)?;
        let number = self.names.len() as u16;
        self.names.push(name.to_owned());
        self.numbers.insert(name.to_owned(), number);
        Ok(number)
    }

    /// All tags, by number.
    #[must_use]
    pub fn names(&self) -> &[String] {
        &self.names
    }
}

/// The routing of a run, in memory: two bytes for each expert of each token.
///
/// A token's *row* has a place for every expert that its layers use, layer by layer
/// ([`Header::row_len`]). A layer for which fewer experts are known has [`NO_EXPERT`] in its last
/// places: engines that compute only the last token of a prompt in the last layer tell of no others.
#[derive(Debug, Clone, PartialEq)]
pub struct Trace {
    header: Header,
    domains: Domains,
    tokens: Vec<Token>,
    experts: Vec<u16>,
    /// Empty, or as long as `experts`. NaN where a weight is not known.
    weights: Vec<f32>,
    /// Where each layer begins in a row, and where the row ends.
    starts: Vec<usize>,
}

impl Trace {
    /// A trace without tokens.
    ///
    /// # Errors
    ///
    /// As [`Header::check`].
    pub fn new(header: Header) -> Result<Self> {
        header.check()?;
        let mut starts = vec![0];
        for layer in &header.layers {
            starts.push(starts[starts.len() - 1] + layer.used as usize);
        }
        Ok(Self {
            header,
            domains: Domains::default(),
            tokens: Vec::new(),
            experts: Vec::new(),
            weights: Vec::new(),
            starts,
        })
    }

    /// The same tokens, each of them a batch of its own: as if none had been computed together.
    #[must_use]
    pub fn one_by_one(mut self) -> Self {
        (0..).zip(&mut self.tokens).for_each(|(batch, token)| token.batch = batch);
        self
    }

    /// Adds a token. `weights` has a routing weight for each place of the row, or is empty.
    ///
    /// # Errors
    ///
    /// [`Error::Damaged`] if the row has not the length of [`Header::row_len`], an expert is not
    /// there or comes twice in a layer, no layer has an expert, or the batch is below the one before.
    /// [`Error::Limit`] if there are too many tokens.
    pub fn push(&mut self, token: Token, experts: &[u16], weights: &[f32]) -> Result<()> {
        let count = self.tokens.len();
        let place = Place::Token(count as u64);
        check_row(&self.header, experts, weights).map_err(|e| e.at(place))?;
        if self.tokens.last().is_some_and(|last| last.batch > token.batch) {
            return Err(Error::damaged(place, "its batch was before that of the last token"));
        }
        if usize::from(token.domain) >= self.domains.names.len() {
            return Err(Error::damaged(place, "its domain has no name"));
        }
        Error::limit("tokens", count as u64 + 1, limits::TOKENS_MAX as u64)?;
        let ids = self.experts.len() + experts.len();
        Error::limit("expert ids", ids as u64, limits::IDS_MAX as u64)?;
        if !weights.is_empty() && self.weights.is_empty() {
            self.weights.resize(self.experts.len(), f32::NAN);
        }
        if !self.weights.is_empty() || !weights.is_empty() {
            match weights {
                [] => self.weights.resize(ids, f32::NAN),
                weights => self.weights.extend_from_slice(weights),
            }
        }
        self.tokens.push(token);
        self.experts.extend_from_slice(experts);
        Ok(())
    }

    /// Model, layers, sampling.
    #[must_use]
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Changes what does not describe the rows: the name of the model, sizes of records.
    ///
    /// # Errors
    ///
    /// If the layers get another shape.
    pub fn set_header(&mut self, header: Header) -> Result<()> {
        header.check()?;
        if !header.same_shape(&self.header) {
            return Err(Error::file("the header is of a model of another shape"));
        }
        self.header = header;
        Ok(())
    }

    /// The tags of [`Token::domain`].
    #[must_use]
    pub fn domains(&self) -> &Domains {
        &self.domains
    }

    /// The same, to add one.
    pub fn domains_mut(&mut self) -> &mut Domains {
        &mut self.domains
    }

    /// All tokens, in the order in which they were computed.
    #[must_use]
    pub fn tokens(&self) -> &[Token] {
        &self.tokens
    }

    /// How many tokens there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Tokens of a phase.
    #[must_use]
    pub fn count(&self, phase: Phase) -> usize {
        self.tokens.iter().filter(|token| token.phase == phase).count()
    }

    /// The row of a token, with [`NO_EXPERT`] in it.
    #[must_use]
    pub fn row(&self, token: usize) -> &[u16] {
        let len = self.starts[self.starts.len() - 1];
        &self.experts[token * len..(token + 1) * len]
    }

    /// The weights of a token's row, NaN where they are not known; none if the trace has none.
    #[must_use]
    pub fn weight_row(&self, token: usize) -> &[f32] {
        if self.weights.is_empty() {
            return &[];
        }
        let len = self.starts[self.starts.len() - 1];
        &self.weights[token * len..(token + 1) * len]
    }

    /// The experts of a token in a layer.
    #[must_use]
    pub fn experts(&self, token: usize, layer: usize) -> &[u16] {
        let layer = &self.row(token)[self.starts[layer]..self.starts[layer + 1]];
        let known = layer.iter().position(|&expert| expert == NO_EXPERT);
        &layer[..known.unwrap_or(layer.len())]
    }

    /// Their routing weights, as many as [`experts`](Self::experts), or none.
    #[must_use]
    pub fn weights(&self, token: usize, layer: usize) -> &[f32] {
        match self.weight_row(token) {
            [] => &[],
            row => &row[self.starts[layer]..][..self.experts(token, layer).len()],
        }
    }
}

/// Refuses a row that is none of this model's.
pub(crate) fn check_row(header: &Header, experts: &[u16], weights: &[f32]) -> Result<()> {
    if experts.len() != header.row_len() {
        let reason = format!("{} experts instead of {}", experts.len(), header.row_len());
        return Err(Error::file(reason));
    }
    if !weights.is_empty() && weights.len() != experts.len() {
        return Err(Error::file(format!("{} weights of {} experts", weights.len(), experts.len())));
    }
    let mut rest = experts;
    let mut any = false;
    for (index, layer) in header.layers.iter().enumerate() {
        let (row, next) = rest.split_at(layer.used as usize);
        rest = next;
        let known = row.iter().position(|&e| e == NO_EXPERT).unwrap_or(row.len());
        any |= known > 0;
        check_layer(index, layer.experts, &row[..known])?;
        if row[known..].iter().any(|&expert| expert != NO_EXPERT) {
            return Err(Error::file(format!("MoE layer {index} has experts after a gap")));
        }
    }
    if any { Ok(()) } else { Err(Error::file("no layer has an expert")) }
}

/// Refuses experts that are not there or come twice.
pub(crate) fn check_layer(index: usize, count: u32, experts: &[u16]) -> Result<()> {
    if let Some(expert) = experts.iter().find(|&&expert| u32::from(expert) >= count) {
        let reason = format!("MoE layer {index} has no expert {expert}, it has {count}");
        return Err(Error::file(reason));
    }
    let mut seen = Seen::new(count);
    match experts.iter().find(|&&expert| seen.add(expert)) {
        Some(expert) => Err(Error::file(format!("MoE layer {index} has expert {expert} twice"))),
        None => Ok(()),
    }
}

/// Which experts have come, without memory of its own for as many as models have today.
struct Seen {
    few: [u64; 16],
    many: Vec<u64>,
}

impl Seen {
    fn new(count: u32) -> Self {
        let many = if count > 1024 { vec![0; (count as usize).div_ceil(64)] } else { Vec::new() };
        Self { few: [0; 16], many }
    }

    /// Whether it was there already.
    fn add(&mut self, expert: u16) -> bool {
        let bits = if self.many.is_empty() { &mut self.few[..] } else { &mut self.many[..] };
        let (word, bit) = (&mut bits[usize::from(expert) / 64], 1 << (expert % 64));
        let was = *word & bit != 0;
        *word |= bit;
        was
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(position: u32) -> Token {
        Token { prompt: 0, position, batch: position, id: None, phase: Phase::Decode, domain: 0 }
    }

    #[test]
    fn rows_are_cut_into_layers() {
        let mut trace = Trace::new(Header::uniform(2, 8, 3)).unwrap();
        trace.push(token(0), &[7, 1, 2, 4, NO_EXPERT, NO_EXPERT], &[]).unwrap();
        trace.push(token(1), &[0, 1, 2, 3, 4, 5], &[0.5; 6]).unwrap();
        assert_eq!(trace.experts(0, 0), [7, 1, 2]);
        assert_eq!(trace.experts(0, 1), [4]);
        assert!(trace.weights(0, 1)[0].is_nan());
        assert_eq!(trace.weights(1, 1), [0.5; 3]);
        assert_eq!((trace.len(), trace.count(Phase::Decode)), (2, 2));
    }

    #[test]
    fn rows_that_are_none_are_refused() {
        let mut trace = Trace::new(Header::uniform(2, 8, 2)).unwrap();
        let gap = NO_EXPERT;
        for (row, told) in [
            (&[0, 1, 2][..], "3 experts instead of 4"),
            (&[0, 8, 2, 3], "MoE layer 0 has no expert 8, it has 8"),
            (&[0, 1, 2, 2], "MoE layer 1 has expert 2 twice"),
            (&[0, 1, gap, 2], "MoE layer 1 has experts after a gap"),
            (&[gap; 4], "no layer has an expert"),
        ] {
            let error = trace.push(token(0), row, &[]).unwrap_err().to_string();
            assert!(error.contains(told) && error.starts_with("token 0: "), "{error}");
        }
        trace.push(token(3), &[0, 1, 2, 3], &[]).unwrap();
        let error = trace.push(token(2), &[0, 1, 2, 3], &[]).unwrap_err().to_string();
        assert!(error.contains("batch"), "{error}");
        let error = trace.push(token(3), &[0, 1, 2, 3], &[0.1]).unwrap_err().to_string();
        assert!(error.contains("1 weights of 4"), "{error}");
    }

    #[test]
    fn more_experts_than_bits_of_the_common_case() {
        let mut trace = Trace::new(Header::uniform(1, 3000, 2)).unwrap();
        trace.push(token(0), &[2999, 0], &[]).unwrap();
        assert!(trace.push(token(1), &[2999, 2999], &[]).is_err());
    }

    #[test]
    fn headers_are_held_to_the_limits() {
        for (header, told) in [
            (Header::uniform(0, 8, 2), "no MoE layer"),
            (Header::uniform(1, 8, 9), "uses 9 of 8"),
            (Header::uniform(1, 0, 0), "uses 0 of 0"),
            (Header::uniform(5000, 8, 2), "MoE layers: 5000"),
            (Header::uniform(1, 70_000, 2), "experts of a layer"),
            (Header::uniform(1000, 128, 100), "experts of a token"),
        ] {
            let error = Trace::new(header).unwrap_err().to_string();
            assert!(error.contains(told), "{error}");
        }
    }
}
