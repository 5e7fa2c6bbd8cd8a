//! The `tierstream` program.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use crate::cli::args::{Bench, Cli, Command};

mod cli;

fn main() -> ExitCode {
    let cli = Cli::parse();
    tierstream::set_verbose(cli.verbose);
    match dispatch(&cli) {
        Ok(code) => code,
        Err(error) => {
            report(&error);
            ExitCode::FAILURE
        }
    }
}

fn dispatch(cli: &Cli) -> anyhow::Result<ExitCode> {
    match &cli.command {
        Command::Run(args) => cli::run::run(cli, args),
        Command::Show(args) => cli::show::show(cli, args),
        Command::Verify(args) => cli::verify::verify(cli, args),
        Command::Bench(Bench::Decode(args)) => cli::bench::decode(cli, args),
        Command::Bench(Bench::Turn(args)) => cli::bench::turn(args),
        Command::Doctor(args) => cli::doctor::doctor(cli, args),
        Command::Completions { shell } => {
            let mut command = Cli::command();
            clap_complete::generate(*shell, &mut command, "tierstream", &mut std::io::stdout());
            Ok(ExitCode::SUCCESS)
        }
        Command::Man => {
            clap_mangen::Man::new(Cli::command()).render(&mut std::io::stdout())?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// One line for the error with its causes, one for the hint.
fn report(error: &anyhow::Error) {
    eprintln!("error: {error:#}");
    if let Some(hint) = error.downcast_ref::<tierstream::Error>().and_then(|e| e.hint()) {
        eprintln!("hint: {hint}");
    }
}
