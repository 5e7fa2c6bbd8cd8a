//! What a name makes of a model: of the same weights, Ollama has several names with a template, a system prompt and
//! parameters each.

use std::sync::{Arc, OnceLock};

use tierstream_chat::{Format, Template};

use crate::ask::{self, Params};
use crate::catalog::{self, Found, Header};
use crate::engine::{Text, Token};
use crate::error::{ApiError, ApiResult};
use crate::grammar::Grammars;

/// A model by one of its names.
pub(crate) struct Preset {
    pub(crate) found: Found,
    pub(crate) template: Template,
    pub(crate) format: Format,
    /// Its own parameters.
    pub(crate) params: Params,
    /// Its own system prompt.
    pub(crate) system: Option<String>,
    /// Control tokens whose names the parser of replies looks for.
    pub(crate) marks: Arc<[Token]>,
    /// Made when one is first asked for, which takes a moment.
    grammars: OnceLock<Result<Grammars, String>>,
}

impl Preset {
    pub(crate) fn new(found: Found, header: &Header, text: &dyn Text) -> ApiResult<Self> {
        let (bos, eos) = text.bos_eos();
        let template = catalog::template(&found, header, (&bos, &eos))?;
        let format = template.format();
        let system = found.layers.system.as_deref().map(catalog::small_file).transpose()?;
        Ok(Self {
            marks: marks(&format, text),
            params: ask::own_params(&found)?,
            system,
            found,
            template,
            format,
            grammars: OnceLock::new(),
        })
    }

    pub(crate) fn is_of(&self, found: &Found) -> bool {
        self.found.name == found.name && self.found.layers == found.layers
    }

    /// What makes guides for the vocabulary `text`.
    pub(crate) fn grammars(&self, text: &dyn Text) -> ApiResult<&Grammars> {
        let made = self.grammars.get_or_init(|| Grammars::new(text, &self.marks));
        made.as_ref()
            .map_err(|why| ApiError::bad(format!("answers of this model take no form: {why}")))
    }
}

fn marks(format: &Format, text: &dyn Text) -> Arc<[Token]> {
    let single = |mark: &&str| match text.tokenize(mark, false, true).ok()?[..] {
        [token] => Some(token),
        _ => None,
    };
    format.marks().iter().filter_map(single).collect()
}
