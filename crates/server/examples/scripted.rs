//! A server of scripted models, for the tests of clients: what it listens on is the first line that it prints.
//!
//! Arguments: a folder, whose GGUFs are the models, and then any of `sequences=N`, `ctx=N`, `queue=N`, `models=N`,
//! `ping=MS`, `key=KEY` and `gate=1`. With the last, steps wait, and lines on the standard input tell what is to happen:
//! `open N` lets so many go, `reached` waits until one waits, and `stopped N` until so many were ended. A line
//! that is done is printed.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tierstream_script::{Gate, Script};
use tierstream_server::engine::Extra;
use tierstream_server::{Server, Settings};
use tierstream_store::{Environment, Store};
use tokio::net::TcpListener;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let folder = PathBuf::from(arguments.next().ok_or("a folder is wanted")?);
    let options: HashMap<String, String> = arguments
        .map(|argument| Some(argument.split_once('=')?).map(|(a, b)| (a.to_owned(), b.to_owned())))
        .collect::<Option<_>>()
        .ok_or("the others are name=value")?;
    let number = |name: &str, usual: usize| options.get(name).map_or(Ok(usual), |n| n.parse());
    let gate = options.contains_key("gate").then(Arc::<Gate>::default);
    let engine = Script {
        sequences: number("sequences", 4)?,
        ctx: number("ctx", 4096)?.try_into()?,
        gate: gate.clone(),
        ..Script::default()
    };
    let listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0))).await?;
    let listens = listener.local_addr()?;
    println!("http://{listens}");
    if let Some(gate) = gate {
        std::thread::spawn(move || obey(&gate));
    }
    let settings = Settings {
        listens,
        models_max: number("models", 3)?,
        queue_max: number("queue", 512)?,
        ping: Duration::from_millis(number("ping", 10_000)?.try_into()?),
        api_keys: options.get("key").cloned().into_iter().collect(),
        ..Settings::default()
    };
    let store = Store::new(&Environment::default());
    Server::new(Arc::new(engine), store, extras(folder)?, settings)
        .run(listener, std::future::pending())
        .await?;
    Ok(())
}

fn extras(folder: PathBuf) -> std::io::Result<Vec<Extra>> {
    let mut extras = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        let name = path.file_stem().and_then(|name| name.to_str()).unwrap_or_default().to_owned();
        extras.push(Extra { name, path });
    }
    Ok(extras)
}

/// Does what the lines of the standard input say.
fn obey(gate: &Gate) {
    for line in std::io::stdin().lines().map_while(Result::ok) {
        let (word, n) = line.split_once(' ').unwrap_or((&line, ""));
        match (word, n.parse()) {
            ("open", Ok(n)) => gate.open(n),
            ("stopped", Ok(n)) => gate.wait_until_stopped(n),
            ("reached", _) => gate.wait_until_reached(),
            _ => panic!("{line:?} is no command"),
        }
        println!("{line}");
    }
}
