//! Why a name leads to no model, and what to do about it.

use std::io;
use std::path::PathBuf;

use crate::limits;

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a model cannot be had by its name.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A text that can be no model's name.
    #[error("{name:?} is no name of a model: {what}")]
    Name {
        /// The text.
        name: String,
        /// What is wrong with it.
        what: &'static str,
    },
    /// A text that names no model of the Hugging Face hub.
    #[error("{name:?} is no name of a model of the Hugging Face hub: {what}")]
    HubName {
        /// The text.
        name: String,
        /// What is wrong with it.
        what: &'static str,
    },
    /// No store has a model of this name.
    #[error("there is no file and no model {name:?}{}", unread(.unreadable.as_deref()))]
    NotFound {
        /// The name.
        name: String,
        /// Names that are there and nearly the same, the nearest first.
        nearest: Vec<String>,
        /// Why a store could not be looked at, if one could not.
        unreadable: Option<Box<Error>>,
    },
    /// Several models have this name.
    #[error("{name:?} can mean {}", list(.candidates))]
    Ambiguous {
        /// The name.
        name: String,
        /// Names that say which.
        candidates: Vec<String>,
    },
    /// A repository of the hub that has no such file.
    #[error("the repository {repo} has no {what}; {}", has(.models))]
    NotInRepository {
        /// `owner/repo`.
        repo: String,
        /// The quantisation or file, or what a model's file is.
        what: String,
        /// The models that it has.
        models: Vec<String>,
    },
    /// A model that is not there as a whole.
    #[error("{}: the model {name:?} is not complete: {what}", path.display())]
    Partial {
        /// The model.
        name: String,
        /// What is missing, or too short.
        path: PathBuf,
        /// In which way.
        what: String,
    },
    /// A model in several files without names that would tell their order.
    #[error("{}: the weights of {name:?} are split over several blobs", path.display())]
    Split {
        /// The model.
        name: String,
        /// Its manifest, or its first blob.
        path: PathBuf,
    },
    /// A model of Ollama's that keeps each tensor as a file of its own.
    #[error(
        "{}: the weights of {name:?} are kept as {tensors} tensors in files of their own, not as a GGUF",
        path.display()
    )]
    TensorBlobs {
        /// The model.
        name: String,
        /// Its manifest.
        path: PathBuf,
        /// Number of tensors.
        tensors: usize,
    },
    /// A model without weights, or with weights of another kind.
    #[error("{}: there is no GGUF of {name:?} here: {what}", path.display())]
    NoGguf {
        /// The model.
        name: String,
        /// Its manifest or folder.
        path: PathBuf,
        /// What is there instead.
        what: &'static str,
    },
    /// A file that is no model, by what it begins with.
    #[error(transparent)]
    NotGguf(#[from] tierstream_gguf::Error),
    /// Not the version of a model that the name asks for.
    #[error("{}: {name:?} has the digest sha256:{found} now", path.display())]
    Digest {
        /// The model, with the digest that it should have.
        name: String,
        /// Its manifest.
        path: PathBuf,
        /// The SHA-256 of the manifest, 64 digits.
        found: String,
    },
    /// A file of a store that leads out of it.
    #[error("{}: leads out of the store, to {}", path.display(), target.display())]
    Outside {
        /// The file.
        path: PathBuf,
        /// Where it leads to.
        target: PathBuf,
    },
    /// A file of a store that is not as it should be.
    #[error("{}: the store is damaged: {what}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// In what way.
        what: String,
    },
    /// More than one of the [`limits`] allows.
    #[error("{}: {what}, more than the limit of {limit}", path.display())]
    Limit {
        /// The file or folder.
        path: PathBuf,
        /// What there is too much of.
        what: &'static str,
        /// The limit.
        limit: u64,
    },
    /// The system does not let this user read something.
    #[error("{}: cannot be read", path.display())]
    Unreadable {
        /// The file or folder.
        path: PathBuf,
        /// What whoever may read it has.
        readers: Readers,
        /// What the system said.
        source: io::Error,
    },
}

/// Who may read a file that this user may not.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Readers {
    /// The users of this group: its name, or its number where it has none.
    Group(String),
    /// Its owner alone.
    Owner,
    /// It is not a matter of permissions, or that is not known.
    Unknown,
}

impl Error {
    /// What the user can do about it, as one sentence without a full stop.
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            Error::NotFound { nearest, unreadable, .. } => {
                let near = (!nearest.is_empty()).then(|| format!("did you mean {}", list(nearest)));
                let read = unreadable.as_ref().and_then(|error| error.hint());
                let none = || {
                    "check the path; `tierstream list` tells what is on this machine, and `demo` \
                     names the small model in the program"
                        .to_owned()
                };
                let all: Vec<String> = near.into_iter().chain(read).collect();
                return Some(if all.is_empty() { none() } else { all.join("; ") });
            }
            Error::Name { .. } => "names are like qwen3:30b, owner/repo:Q4_K_M, or a file's",
            Error::NotInRepository { models, .. } if models.is_empty() => {
                "fetch a GGUF of the model, whose repositories mostly have names that end in -GGUF"
            }
            Error::HubName { .. } => {
                "names are like owner/repo:Q4_K_M; a model of Ollama's registry is fetched by \
                 Ollama itself (`ollama pull`, with its own server running and OLLAMA_HOST not pointing here), and \
                 found where that puts it"
            }
            Error::Ambiguous { .. } | Error::NotInRepository { .. } => "name one of these",
            Error::Partial { .. } => "fetch the model again, with the program that it is from",
            Error::Split { .. } => {
                "fetch it from where it is from as files named ...-00001-of-0000N.gguf, and name the first"
            }
            Error::TensorBlobs { .. } | Error::NoGguf { .. } => {
                "fetch a GGUF of the model, whose repositories mostly have names that end in -GGUF"
            }
            Error::NotGguf(error) => return error.hint(),
            Error::Digest { .. } => "without the @digest, the name means what is there now",
            Error::Outside { target, .. } => {
                return Some(format!("name the file itself if you trust it: {}", target.display()));
            }
            Error::Damaged { .. } => {
                "remove the model with the program that it is from, and fetch it again"
            }
            Error::Unreadable { readers: Readers::Group(group), .. } => {
                return Some(format!(
                    "join the group that may read it, and log in again: sudo usermod -aG {group} $USER"
                ));
            }
            Error::Unreadable { readers: Readers::Owner, path, .. } => {
                return Some(format!(
                    "its owner keeps it to itself; to let others read it: sudo chmod -R go+rX {}",
                    path.display()
                ));
            }
            Error::Limit { .. } | Error::Unreadable { .. } => return None,
        };
        Some(hint.to_owned())
    }
}

/// What could not be looked at, behind what was not found.
fn unread(error: Option<&Error>) -> String {
    error.map_or(String::new(), |error| {
        let cause = std::error::Error::source(error).map_or(String::new(), |e| format!(": {e}"));
        format!("; a store could not be searched: {error}{cause}")
    })
}

/// What a repository has.
fn has(models: &[String]) -> String {
    match models {
        [] => "it has no GGUF at all".to_owned(),
        all if all.len() <= limits::MAX_TOLD_OF_REPOSITORY => format!("it has {}", all.join(", ")),
        all => {
            let told = &all[..limits::MAX_TOLD_OF_REPOSITORY];
            format!("it has {} and {} more", told.join(", "), all.len() - told.len())
        }
    }
}

/// `a, b or c`, and how many more.
fn list(names: &[String]) -> String {
    let told = &names[..names.len().min(limits::MAX_TOLD)];
    match (told, names.len() - told.len()) {
        ([first @ .., last], 0) if !first.is_empty() => format!("{} or {last}", first.join(", ")),
        (all, 0) => all.join(", "),
        (all, more) => format!("{} or {more} more", all.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_words() {
        let of = |n: usize| list(&(0..n).map(|i| i.to_string()).collect::<Vec<_>>());
        assert_eq!((of(0), of(1), of(2)), (String::new(), "0".into(), "0 or 1".into()));
        assert_eq!(
            (of(3), of(10)),
            ("0, 1 or 2".into(), "0, 1, 2, 3, 4, 5, 6, 7 or 2 more".into())
        );
    }

    #[test]
    fn what_was_not_found_hints_at_names_and_at_stores_that_were_not_searched() {
        let unreadable = || {
            Box::new(Error::Unreadable {
                path: "/s".into(),
                readers: Readers::Group("ollama".into()),
                source: io::ErrorKind::PermissionDenied.into(),
            })
        };
        let error = |nearest: &[&str], unreadable| Error::NotFound {
            name: "qwen".into(),
            nearest: nearest.iter().map(|&n| n.to_owned()).collect(),
            unreadable,
        };
        assert!(error(&[], None).hint().unwrap().contains("tierstream list"));
        assert_eq!(error(&["qwen3:30b"], None).hint().unwrap(), "did you mean qwen3:30b");
        let both = error(&["qwen3:30b"], Some(unreadable()));
        assert_eq!(
            both.to_string(),
            "there is no file and no model \"qwen\"; a store could not be searched: /s: cannot be \
             read: permission denied"
        );
        let hint = both.hint().unwrap();
        assert!(hint.starts_with("did you mean qwen3:30b; join the group"), "{hint}");
        assert!(hint.ends_with("usermod -aG ollama $USER"), "{hint}");
    }
}
