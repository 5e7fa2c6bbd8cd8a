//! Fetches a model: `cargo run --example pull owner/repo:quant`.

use tierstream_pull::{Cancel, Event, Observer, Options, Puller};
use tierstream_store::{Environment, HubName};

struct Lines;

impl Observer for Lines {
    fn report(&self, event: Event<'_>) {
        eprintln!("{event:?}");
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let name = std::env::args().nth(1).ok_or("which model?")?;
    let mut options = Options::default();
    if let Some(bytes) = std::env::args().nth(2) {
        // Small ones, to see it work with small files.
        options.piece_bytes = bytes.parse()?;
        options.record_bytes = options.piece_bytes;
    }
    let puller = Puller::new(&Environment::of_process(), options)?;
    let pulled = puller.pull(&HubName::parse(&name)?, &Lines, &Cancel::new())?;
    println!("{} is {}", pulled.name, pulled.path.display());
    Ok(())
}
