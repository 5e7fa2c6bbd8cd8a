//! `tierstream serve`: models over HTTP.

mod models;
#[cfg(test)]
mod tests;
mod traces;

use std::net::SocketAddr;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use anyhow::Context as _;
use signal_hook::low_level;
use tierstream_pull::{Options, Puller};
use tierstream_server::engine::Extra;
use tierstream_server::{Server, Settings};
use tierstream_store::{Environment, Store};
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};

use self::models::Models;
use super::args::{Cli, Serve};
use super::interrupt;
use super::keys;
use super::named::{self, Named};
use super::open;
use super::output::{self, Failure};

pub(crate) fn serve(cli: &Cli, args: &Serve) -> anyhow::Result<ExitCode> {
    // What is wrong with the flags is told now, and not to the first client.
    open::options(&args.engine, args.experts)?;
    open::beyond_memory(&args.engine).iter().for_each(output::note);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = runtime.context("cannot start the server's threads")?;
    let done = runtime.block_on(listen(cli, args));
    // What still computes is not waited for.
    runtime.shutdown_background();
    done
}

async fn listen(cli: &Cli, args: &Serve) -> anyhow::Result<ExitCode> {
    let folders = [("--prompt-folder", &args.prompt_folder), ("--trace", &args.trace)];
    for (flag, folder) in folders {
        folder.iter().try_for_each(|folder| try_folder(flag, folder))?;
    }
    let address = &args.host.host;
    let listener =
        TcpListener::bind(address).await.map_err(|error| cannot_listen(address, &error))?;
    let listens = listener.local_addr().context("the listener has no address")?;
    let environment = Environment::of_process();
    let settings = Settings {
        keep_alive: args.keep_alive,
        ctx: args.ctx().unwrap_or(tierstream::DEFAULT_CTX),
        models_max: args.max_models as usize,
        queue_max: args.max_queue as usize,
        deadline: Duration::from_secs(args.timeout.into()),
        api_keys: args.api_keys.as_deref().map(keys::read).transpose()?.unwrap_or_default(),
        origins: args.origins.clone(),
        prompts: args.prompts(),
        puller: puller(&environment),
        listens,
        ..Settings::default()
    };
    if !listens.ip().is_loopback() && settings.api_keys.is_empty() {
        output::note(
            "whoever reaches this address may use the models: --api-keys has requests need a key",
        );
    }
    let grace = settings.grace;
    let models = Arc::new(Models::new(args, &args.prompts()));
    named::missing_folders(&environment).iter().for_each(output::note);
    let store = Store::new(&environment);
    named::unsearched(&store).iter().for_each(output::note);
    let server = Server::new(models.clone(), store, extras(args)?, settings);
    tell(cli, listens)?;
    let stop = async move {
        stopped().await;
        models.stop();
        let grace = output::rough(grace.as_secs_f64());
        let line = format!("stopping: answers have {grace} to end; Ctrl-C again ends them at once");
        output::status("2", &line);
    };
    server.run(listener, stop).await.context("the server failed")?;
    Ok(ExitCode::SUCCESS)
}

/// What fetches models for clients. A server does without, if the environment does not allow it.
fn puller(environment: &Environment) -> Option<Arc<Puller>> {
    let puller = Puller::new(environment, Options::default());
    let told = |error| output::note(format!("no client can have a model fetched: {error}"));
    puller.map_err(told).ok().map(Arc::new)
}

fn tell(cli: &Cli, listens: SocketAddr) -> anyhow::Result<()> {
    let url = format!("http://{listens}");
    if cli.json {
        return output::json(&serde_json::json!({ "url": url }));
    }
    output::status("2", &format!("listening on {url} (Ollama's API, and OpenAI's under /v1)"));
    output::status("2", &format!("a page to look at, with a chat: {url}/ui"));
    Ok(())
}

/// Files are written there while requests run, who would not be told.
fn try_folder(flag: &str, folder: &Path) -> anyhow::Result<()> {
    let probe = folder.join(format!("{}.partial", std::process::id()));
    let tried = std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)
        .and_then(|()| std::fs::write(&probe, []))
        .and_then(|()| std::fs::remove_file(&probe));
    tried.map_err(|error| {
        let text = format!("{flag} {}: {error}", folder.display());
        Failure::error(text, "it is to be a folder that this user can write to")
    })
}

fn cannot_listen(address: &str, error: &std::io::Error) -> anyhow::Error {
    let hint = match error.kind() {
        std::io::ErrorKind::AddrInUse => {
            "another program listens there, perhaps Ollama: stop it, or choose another port with --host :11435"
        }
        std::io::ErrorKind::PermissionDenied => "ports below 1024 are for root",
        _ => "--host takes an address of this machine: 127.0.0.1, or 0.0.0.0 for all of them",
    };
    Failure::error(format!("cannot listen on {address}: {error}"), hint)
}

/// The first signal lets answers end, the second one ends the program.
async fn stopped() {
    let kinds = interrupt::wanted().map(SignalKind::from_raw);
    let mut signals: Vec<Signal> = kinds.filter_map(|kind| signal(kind).ok()).collect();
    next(&mut signals).await;
    tokio::spawn(async move {
        next(&mut signals).await;
        low_level::exit(1);
    });
}

/// Waits for any of them.
async fn next(signals: &mut [Signal]) {
    std::future::poll_fn(|context| {
        let came = signals.iter_mut().any(|signal| signal.poll_recv(context).is_ready());
        if came { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
}

/// The demo model, and those whose files were named. Names of a store are served anyhow.
fn extras(args: &Serve) -> anyhow::Result<Vec<Extra>> {
    let demo = Extra { name: "demo".into(), path: Named::find(Path::new("demo"))?.path };
    let named = args.models.iter().map(|model| extra(model)).filter_map(Result::transpose);
    named.chain([Ok(demo)]).collect()
}

/// A model beside those of the stores, if it is none of these.
fn extra(model: &Path) -> anyhow::Result<Option<Extra>> {
    let named = Named::find(model)?;
    if named.is_stored() && !named.layers().adapters.is_empty() {
        let what = format!("{} has a LoRA beside its weights", model.display());
        return Err(Failure::error(what, "`tierstream run` runs it without"));
    }
    if named.is_stored() || model == Path::new("demo") {
        return Ok(None);
    }
    tierstream::pack::open(&named.path).map_err(tierstream::Error::from)?;
    let name = model.file_stem().and_then(|name| name.to_str());
    let name = name.with_context(|| format!("{}: this is no name of a file", model.display()))?;
    Ok(Some(Extra { name: name.to_owned(), path: named.path }))
}
