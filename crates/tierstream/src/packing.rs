//! What packing a model would gain: fewer reads for a record, none of them in vain.

use std::path::Path;

use serde::Serialize;
use tierstream_gguf::{Experts, Model};
use tierstream_io::plan::{Layout, Plan, Wanted};
use tierstream_io::{Config, File, FileId};
use tierstream_pack::Gain;

use crate::error::Result;

/// What packing gains, and what it costs. Bytes of a record are those of the mean one.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Packing {
    /// Reads that a record takes as the model lies now; a packed one takes one.
    pub reads_per_record: f64,
    /// Bytes that those reads bring besides the record, because a drive reads whole blocks.
    pub vain_bytes_per_record: u64,
    /// The same of a packed model: what aligns its parts.
    pub packed_vain_bytes_per_record: u64,
    /// Bytes of the packed file.
    pub file_bytes: u64,
    /// Bytes that it has more than the model.
    pub extra_bytes: i64,
    /// Bytes of a packed file of the experts alone, which needs the model's own files beside it.
    pub experts_only_bytes: u64,
}

impl Packing {
    /// Of a model that lies in GGUF files. `None` for one without experts, one that is packed, and one
    /// that llama.cpp refuses.
    ///
    /// # Errors
    /// As [`Experts::group`], and of opening the model's files.
    pub fn of(file: &Model) -> Result<Option<Self>> {
        let experts = Experts::group(file)?;
        let streamed = |l: &&tierstream_gguf::experts::MoeLayer| l.is_streamed();
        let records: u64 =
            experts.layers().iter().filter(streamed).map(|l| u64::from(l.experts)).sum();
        if records == 0 || file.originals().is_some() || file.check_ggml().is_err() {
            return Ok(None);
        }
        let gain = Gain::of(file)?;
        let layouts = file.files().iter().map(|f| layout(&f.path)).collect::<Result<Vec<_>>>()?;
        let (mut reads, mut read_bytes, mut bytes) = (0, 0, 0);
        for (index, layer) in experts.layers().iter().enumerate().filter(|(_, l)| l.is_streamed()) {
            for expert in 0..layer.experts {
                let extents = experts.record(index, expert).into_iter().flatten();
                let wanted = extents.enumerate().map(|(piece, extent)| Wanted {
                    piece,
                    file: FileId(u32::try_from(extent.file).expect("files are few")),
                    offset: extent.offset,
                    len: extent.len,
                    in_place: None,
                });
                let buffer_bytes = Config::default().buffer_bytes;
                let plan = Plan::new(wanted.collect(), |id| layouts[id.0 as usize], buffer_bytes);
                reads += plan.reads().len() as u64;
                read_bytes += plan.reads().iter().map(|read| read.len as u64).sum::<u64>();
                bytes += layer.record_bytes;
            }
        }
        Ok(Some(Self {
            reads_per_record: reads as f64 / records as f64,
            vain_bytes_per_record: (read_bytes - bytes) / records,
            packed_vain_bytes_per_record: (gain.record_bytes - bytes) / records,
            file_bytes: gain.file_bytes,
            extra_bytes: gain.file_bytes.cast_signed() - file.file_bytes().cast_signed(),
            experts_only_bytes: gain.experts_only_bytes,
        }))
    }
}

/// How reads of a file are aligned.
fn layout(path: &Path) -> Result<Layout> {
    let file = File::open(path)?;
    Ok(Layout { align: file.direct_state().offset_align, size: file.size() })
}
