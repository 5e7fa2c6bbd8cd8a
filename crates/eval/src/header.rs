//! What is known of all of a trace: the model, its MoE layers, how tokens were drawn.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::limits;

/// The head of a trace.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Header {
    /// The model that was traced.
    pub model: Model,
    /// Its MoE layers in the order in which they are computed. Dense layers are not among them.
    pub layers: Vec<Layer>,
    /// Whether the experts of a token stand in the order of the router's scores, best first. Some
    /// formats sort them by number.
    #[serde(default)]
    pub ranked: bool,
    /// How the decoded tokens were drawn, if that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sampling: Option<Sampling>,
    /// What the trace was made or imported from.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub source: String,
}

/// Which model it was.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Model {
    /// As it was called. May be empty.
    #[serde(default)]
    pub name: String,
    /// Digest of the weights' headers, with its kind before it (`xxh3:...`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hash: Option<String>,
    /// `general.architecture` of a GGUF, or what stands for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub architecture: Option<String>,
}

/// One MoE layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layer {
    /// Number of the block in the model, in which dense layers count.
    pub block: u32,
    /// Routed experts.
    pub experts: u32,
    /// The most experts that a token is routed to.
    pub used: u32,
    /// Bytes of one expert's record; 0 if that is not known.
    #[serde(default)]
    pub record_bytes: u64,
}

/// How tokens were drawn.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Sampling {
    /// 0 is greedy.
    pub temperature: Option<f32>,
    /// Draw from so many most likely tokens.
    pub top_k: Option<i32>,
    /// Draw from the most likely tokens that together have this probability.
    pub top_p: Option<f32>,
    /// Leave out tokens less likely than this share of the most likely one.
    pub min_p: Option<f32>,
    /// Seed of the generator.
    pub seed: Option<u64>,
}

impl Header {
    /// Of a model with equal layers, of which nothing else is known.
    #[must_use]
    pub fn uniform(layers: u32, experts: u32, used: u32) -> Self {
        let layer = |block| Layer { block, experts, used, record_bytes: 0 };
        Self {
            model: Model::default(),
            layers: (0..layers).map(layer).collect(),
            ranked: false,
            sampling: None,
            source: String::new(),
        }
    }

    /// Places for expert ids in the row of a token: the sum of what all layers use.
    #[must_use]
    pub fn row_len(&self) -> usize {
        self.layers.iter().map(|layer| layer.used as usize).sum()
    }

    /// Bytes of the records that one token needs; 0 if no sizes are known.
    #[must_use]
    pub fn token_bytes(&self) -> u64 {
        self.layers.iter().map(|l| u64::from(l.used).saturating_mul(l.record_bytes)).sum()
    }

    /// Bytes of all records; 0 if no sizes are known.
    #[must_use]
    pub fn total_bytes(&self) -> u64 {
        self.layers.iter().map(|l| u64::from(l.experts).saturating_mul(l.record_bytes)).sum()
    }

    /// Whether two traces are of models of the same shape.
    #[must_use]
    pub fn same_shape(&self, other: &Self) -> bool {
        let shape = |header: &Self| -> Vec<(u32, u32)> {
            header.layers.iter().map(|layer| (layer.experts, layer.used)).collect()
        };
        shape(self) == shape(other)
    }

    /// Whether the trace can be one of a model with these layers.
    ///
    /// # Errors
    ///
    /// If it is of a model of another shape: the message has both.
    pub fn check_model(&self, layers: &[Layer]) -> Result<()> {
        let of = |layers: &[Layer]| {
            let shape = |layer: &Layer| format!("{} of {} experts", layer.used, layer.experts);
            let first = layers.first().map(shape).unwrap_or_default();
            let equal = layers.iter().all(|layer| shape(layer) == first);
            let rest = if equal { "" } else { " and others" };
            format!("{} MoE layers with {first}{rest}", layers.len())
        };
        let shape = |layer: &Layer| (layer.experts, layer.used);
        if self.layers.iter().map(shape).eq(layers.iter().map(shape)) {
            return Ok(());
        }
        Err(Error::file(format!(
            "the trace is of another model: it has {}, the model has {}",
            of(&self.layers),
            of(layers)
        )))
    }

    /// # Errors
    ///
    /// If it is beyond a [limit](crate::limits), or if a layer has no experts or uses more than it has.
    pub fn check(&self) -> Result<()> {
        Error::limit("MoE layers", self.layers.len() as u64, limits::LAYERS_MAX as u64)?;
        if self.layers.is_empty() {
            return Err(Error::file("the trace has no MoE layer"));
        }
        for (index, layer) in self.layers.iter().enumerate() {
            let Layer { experts, used, .. } = *layer;
            Error::limit("experts of a layer", experts.into(), limits::EXPERTS_MAX.into())?;
            Error::limit("experts used in a layer", used.into(), limits::USED_MAX.into())?;
            if experts == 0 || used == 0 || used > experts {
                let reason = format!("MoE layer {index} uses {used} of {experts} experts");
                return Err(Error::file(reason));
            }
            if layer.record_bytes > 1 << 48 {
                return Err(Error::file(format!(
                    "MoE layer {index} has records of {} bytes",
                    layer.record_bytes
                )));
            }
        }
        Error::limit("experts of a token", self.row_len() as u64, limits::ROW_MAX as u64)?;
        for text in [&self.model.name, &self.source] {
            Error::limit("bytes of a name", text.len() as u64, limits::HEADER_BYTES_MAX as u64)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn traces_of_other_models_are_told() {
        let trace = Header::uniform(48, 128, 6);
        trace.check_model(&Header::uniform(48, 128, 6).layers).unwrap();
        let error = trace.check_model(&Header::uniform(24, 32, 4).layers).unwrap_err().to_string();
        let told =
            "it has 48 MoE layers with 6 of 128 experts, the model has 24 MoE layers with 4 of 32";
        assert!(error.contains(told), "{error}");
        assert!(trace.check_model(&[]).is_err());
        assert_eq!(trace.token_bytes(), 0);
    }
}
