//! The settings of `serve` in a file: what flags and environment leave open.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::error::{ContextKind, ContextValue};
use clap::{Command, FromArgMatches};

use super::args::{self, Cli};
use super::output::Failure;

/// The flags of this process. Those of `serve` that are not given, nor in the environment, have what the file
/// says that `--config` names, or else the one that is at its usual place.
pub(crate) fn parse() -> anyhow::Result<Cli> {
    let given: Vec<OsString> = std::env::args_os().collect();
    let first = args::command().try_get_matches_from(&given).unwrap_or_else(|error| exit(error));
    let mut command = args::command();
    if let Some(("serve", serve)) = first.subcommand() {
        let named = serve.get_one::<PathBuf>("config").cloned();
        if let Some(path) = named.or_else(|| usual().filter(|path| path.exists())) {
            command = with_settings(command, &path)?;
        }
    }
    let matches = command.try_get_matches_from(&given).unwrap_or_else(|error| exit(error));
    Ok(Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit()))
}

/// Tells of an error of the flags, and of the variable that a value may be from.
fn exit(mut error: clap::Error) -> ! {
    if let Some(tip) = variable(&error) {
        error.insert(ContextKind::Suggested, ContextValue::StyledStrs(vec![tip.into()]));
    }
    error.exit()
}

/// That the value which is refused stands in a variable of the environment, if it does.
fn variable(error: &clap::Error) -> Option<String> {
    let text = |kind| match error.get(kind)? {
        ContextValue::String(text) => Some(text.as_str()),
        _ => None,
    };
    let (arg, value) = (text(ContextKind::InvalidArg)?, text(ContextKind::InvalidValue)?);
    let mut command = args::command();
    command.build();
    let mut args = command.get_subcommands().flat_map(Command::get_arguments);
    let variable = args.find(|known| known.to_string() == arg && known.get_env().is_some());
    let variable = variable?.get_env()?;
    (std::env::var_os(variable)? == value)
        .then(|| format!("it may be from the environment: {}={value}", variable.display()))
}

/// Where the file is if nobody says where.
fn usual() -> Option<PathBuf> {
    let folder =
        |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let config = folder("XDG_CONFIG_HOME").or_else(|| Some(folder("HOME")?.join(".config")))?;
    Some(config.join("tierstream/serve.toml"))
}

/// Gives the flags of `serve` the values of a file as their defaults, so that they are read as flags are.
fn with_settings(mut command: Command, path: &Path) -> anyhow::Result<Command> {
    let text =
        std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let settings: toml::Table = text.parse().map_err(|error: toml::de::Error| {
        let hint = "it has lines like: ram = \"8GiB\"";
        Failure::error(format!("{}: {}", path.display(), error.to_string().trim_end()), hint)
    })?;
    for (key, value) in &settings {
        let id = id_of(&command, key).map_err(|hint| {
            Failure::error(format!("{}: {key} is no flag of serve", path.display()), hint)
        })?;
        let wrong = |why: &str| {
            let hint = format!("tierstream serve --help tells what --{key} takes");
            Failure::error(format!("{}: {key}: {why}", path.display()), hint)
        };
        let values = values(value).ok_or_else(|| wrong("it is text, a number, true, or a list"))?;
        command = command.mut_subcommand("serve", |serve| {
            serve.mut_arg(&id, |flag| flag.default_values(values))
        });
        command.clone().try_get_matches_from(["tierstream", "serve"]).map_err(|error| {
            let text = error.to_string();
            let line = text.lines().next().unwrap_or_default();
            wrong(line.strip_prefix("error: ").unwrap_or(line))
        })?;
    }
    Ok(command)
}

/// The argument of that name, or a hint.
fn id_of(command: &Command, key: &str) -> Result<String, String> {
    let serve = command.find_subcommand("serve").expect("it is one");
    let flags = || {
        let named = |arg: &clap::Arg| match arg.get_long() {
            Some(long) => Some((long.to_owned(), arg.get_id().to_string())),
            None => Some((arg.get_id().to_string(), arg.get_id().to_string())),
        };
        let shown = serve.get_arguments().filter(|arg| !arg.is_hide_set());
        shown.filter_map(named).filter(|(name, _)| name != "config")
    };
    if let Some((_, id)) = flags().find(|(name, _)| name == key) {
        return Ok(id);
    }
    let near = flags().max_by(|(a, _), (b, _)| {
        strsim::jaro_winkler(a, key).total_cmp(&strsim::jaro_winkler(b, key))
    });
    Err(near.map_or_else(String::new, |(name, _)| format!("perhaps {name}?")))
}

fn values(value: &toml::Value) -> Option<Vec<String>> {
    match value {
        toml::Value::String(text) => Some(vec![text.clone()]),
        toml::Value::Integer(number) => Some(vec![number.to_string()]),
        toml::Value::Float(number) => Some(vec![number.to_string()]),
        toml::Value::Boolean(on) => Some(vec![on.to_string()]),
        toml::Value::Array(all) => {
            all.iter().map(values).collect::<Option<Vec<_>>>().map(|all| all.concat())
        }
        toml::Value::Datetime(_) | toml::Value::Table(_) => None,
    }
}
