//! Completion scripts and the man page, from the same words as `--help`.

use std::process::ExitCode;

use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, roman};

use super::args::{self, ENVIRONMENT};
use super::output;

pub(crate) fn completions(shell: clap_complete::Shell) -> anyhow::Result<ExitCode> {
    // clap panics when it cannot write, so not to stdout, which may be closed.
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut args::command(), "tierstream", &mut script);
    output::print(&String::from_utf8_lossy(&script))?;
    Ok(ExitCode::SUCCESS)
}

pub(crate) fn man() -> anyhow::Result<ExitCode> {
    output::print(&String::from_utf8_lossy(&page()?))?;
    Ok(ExitCode::SUCCESS)
}

/// One page: the program, then a section for each verb with its flags.
fn page() -> std::io::Result<Vec<u8>> {
    let mut command = args::command();
    command.build();
    let mut page = Vec::new();
    let man = Man::new(command.clone());
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    man.render_options_section(&mut page)?;
    man.render_subcommands_section(&mut page)?;
    environment(&mut page)?;
    man.render_version_section(&mut page)?;
    verbs(&command, "tierstream", &mut page)?;
    Ok(page)
}

/// What stands below `--help`. clap_mangen would fill its lines into one paragraph.
fn environment(page: &mut Vec<u8>) -> std::io::Result<()> {
    let mut roff = Roff::new();
    roff.control("SH", ["ENVIRONMENT"]);
    for line in ENVIRONMENT.lines().skip(1) {
        let text = match line.trim_start().split_once("  ") {
            Some((name, text)) => {
                roff.control("TP", []).text([bold(name)]);
                text
            }
            None => line,
        };
        roff.text([roman(text.trim())]);
    }
    roff.to_writer(page)
}

fn verbs(command: &clap::Command, path: &str, page: &mut Vec<u8>) -> std::io::Result<()> {
    let shown = |verb: &&clap::Command| !verb.is_hide_set() && verb.get_name() != "help";
    for verb in command.get_subcommands().filter(shown) {
        let name = format!("{path} {}", verb.get_name());
        page.extend_from_slice(format!(".SH \"{}\"\n", name.to_uppercase()).as_bytes());
        let man = Man::new(verb.clone().disable_help_flag(true));
        let mut section = Vec::new();
        man.render_synopsis_section(&mut section)?;
        man.render_description_section(&mut section)?;
        man.render_options_section(&mut section)?;
        let section = String::from_utf8_lossy(&section).replace(".SH ", ".SS ");
        page.extend_from_slice(section.as_bytes());
        verbs(verb, &name, page)?;
    }
    Ok(())
}
