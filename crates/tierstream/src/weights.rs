//! What a model's weights are compared with while they are loaded and streamed.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tierstream_ggml::{ChecksumSource, Checksums};
use tierstream_gguf::{FileInfo, Model};
use tierstream_io::Reader;
use tierstream_pack::Pack;
use tierstream_sums::{Against, Reference, date};

use crate::drive::Io;
use crate::error::{Error, Result};
use crate::reading::io_config_for;

/// The checksums of a model's weights, for [`Options::weight_sums`](crate::Options::weight_sums).
#[derive(Debug)]
pub struct WeightSums {
    reference: Reference,
    /// Of which model.
    files: Vec<FileInfo>,
}

impl WeightSums {
    /// Those of the model at `path`: of a packed one, its own. Of another one, those that were recorded
    /// in the folder `records`; if there are none, all of it is read once, as `io` says, and they
    /// are recorded there. Without a folder, nothing is kept. `progress` gets the share that is read,
    /// and stops it by returning false.
    ///
    /// # Errors
    /// [`Error::Gguf`], [`Error::Pack`], [`Error::Io`], and [`Error::Sums`]: as
    /// [`tierstream_sums::reference`].
    pub fn of(
        path: &Path,
        records: Option<&Path>,
        io: Io,
        progress: &mut dyn FnMut(f32) -> bool,
    ) -> Result<Self> {
        if tierstream_pack::is_packed(path) {
            let pack = Pack::open(path)?;
            return Ok(Self {
                reference: Self::packed(&pack),
                files: pack.model().files().to_vec(),
            });
        }
        let model = Model::open(path)?;
        // They are computed in host memory.
        let io = if io == Io::Cufile { Io::Auto } else { io };
        let paths: Vec<_> = model.files().iter().map(|file| file.path.clone()).collect();
        let reader = Arc::new(Reader::new(io_config_for(io, &paths)?)?);
        let reference = tierstream_sums::reference(&model, records, &reader, progress)?;
        Ok(Self { reference, files: model.files().to_vec() })
    }

    /// Those of the weights that a packed `file` of experts alone leaves in other files, which may have been
    /// exchanged for such of the same length and header: they are always compared. None for other models.
    pub(crate) fn of_other_files(file: &Model) -> Result<Option<Arc<Checksums>>> {
        if file.originals().is_none() || file.files().len() == 1 {
            return Ok(None);
        }
        let pack = Pack::open(&file.files()[0].path)?;
        let sums = pack.model().tensors().iter().zip(pack.checksums());
        let sums = sums.map(|(tensor, sums)| if tensor.file == 0 { &[][..] } else { sums });
        let reference =
            Reference { sums: sums.map(<[u64]>::to_vec).collect(), ..Self::packed(&pack) };
        Self { reference, files: pack.model().files().to_vec() }.checksums(file).map(Some)
    }

    fn packed(pack: &Pack) -> Reference {
        Reference {
            sums: pack.checksums().to_vec(),
            against: Against::Pack,
            record: None,
            recorded: None,
            first: None,
            notes: Vec::new(),
        }
    }

    /// Where they come from.
    pub fn against(&self) -> Against {
        self.reference.against
    }

    /// The record that they are in, if there is one.
    pub fn record(&self) -> Option<&PathBuf> {
        self.reference.record.as_ref()
    }

    /// When they were recorded; none of a packed model, which does not say.
    pub fn recorded(&self) -> Option<SystemTime> {
        self.reference.recorded
    }

    /// If all of the model was read to compute them: how many bytes, and how long that took.
    pub fn first_read(&self) -> Option<(u64, Duration)> {
        self.reference.first
    }

    /// Lines that a user should see once.
    pub fn notes(&self) -> &[String] {
        &self.reference.notes
    }

    /// A phrase that says where a checksum is from: `recorded on ...`.
    pub fn source(&self) -> String {
        let record = self.record().map(|path| format!(" ({})", path.display())).unwrap_or_default();
        match (self.against(), self.recorded()) {
            (Against::Record, Some(recorded)) => format!("recorded on {}{record}", date(recorded)),
            (Against::Pack, _) | (_, None) => "that the packed file has for it".to_owned(),
            _ => format!("that it had when it was first read, just before{record}"),
        }
    }

    /// For a load of `file`, which has to be the same model.
    pub(crate) fn checksums(&self, file: &Model) -> Result<Arc<Checksums>> {
        if file.files() != self.files {
            let what = "it was exchanged or written to since its checksums were looked up".into();
            let path = file.files()[0].path.as_path().into();
            return Err(Error::Io(tierstream_io::Error::Changed { path, what }));
        }
        let source = ChecksumSource { what: self.source(), record: self.record().cloned() };
        Ok(Checksums::new(file, &self.reference.sums, source)?)
    }
}
