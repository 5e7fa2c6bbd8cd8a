//! The `tierstream` program.

#![forbid(unsafe_code)]
#![deny(clippy::print_stdout, clippy::print_stderr)]

use std::process::ExitCode;

use crate::cli::args::{Bench, Cli, Command, Eval};
use crate::cli::{interrupt, output};

mod cli;

fn main() -> ExitCode {
    // While there is one thread. What it did not bring about, `doctor` tells.
    tierstream_cuda::load_modules_eagerly();
    let cli = match cli::config::parse() {
        Ok(cli) => cli,
        Err(error) => {
            output::report(&error, false);
            return ExitCode::from(2);
        }
    };
    tierstream::set_verbose(cli.log);
    cli::gave_up::install(cli.json);
    match dispatch(&cli) {
        Ok(code) => code,
        // As `head` and its like expect of what they read from.
        Err(error) if output::is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            output::report(&error, cli.json);
            interrupt::exit_code().unwrap_or(ExitCode::FAILURE)
        }
    }
}

fn dispatch(cli: &Cli) -> anyhow::Result<ExitCode> {
    match &cli.command {
        Command::Run(args) => cli::run::run(cli, args),
        Command::Serve(args) => cli::serve::serve(cli, args),
        Command::Ps(args) => cli::client::ps(cli, args),
        Command::Stop(args) => cli::client::stop(cli, args),
        Command::Pull(args) => cli::pull::pull(cli, args),
        Command::List => cli::list::list(cli),
        Command::Show(args) => cli::show::show(cli, args),
        Command::Verify(args) => cli::verify::verify(cli, args),
        Command::Bench(Bench::Decode(args)) => cli::bench::decode(cli, args),
        Command::Bench(Bench::Prefill(args)) => cli::bench::prefill(cli, args),
        Command::Bench(Bench::Load(args)) => cli::bench::load(cli, args),
        Command::Bench(Bench::Io(args)) => cli::bench::io(cli, args),
        Command::Bench(Bench::Turn(args)) => cli::bench::turn(args),
        Command::Bench(Bench::PrefillTurn(args)) => cli::bench::prefill_turn(args),
        Command::Bench(Bench::LoadTurn(args)) => cli::bench::load_turn(args),
        Command::Plan(args) => cli::plan::plan(cli, args),
        Command::Pack(args) => cli::pack::pack(cli, args),
        Command::Trace(args) => cli::trace::trace(cli, args),
        Command::Eval(Eval::Metrics(args)) => cli::eval::metrics(cli, args),
        Command::Eval(Eval::Squeeze(args)) => cli::bench::squeeze(cli, args),
        Command::Eval(Eval::Simulate(args)) => cli::eval::simulate(cli, args),
        Command::Eval(Eval::Compare(args)) => cli::eval::compare(cli, args),
        Command::Eval(Eval::Report(args)) => cli::eval::report(cli, args),
        Command::Doctor(args) => cli::doctor::doctor(cli, args),
        Command::Completions { shell } => cli::man::completions(*shell),
        Command::Man => cli::man::man(),
    }
}
