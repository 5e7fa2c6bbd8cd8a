//! Many clients at once: `load ADDRESS MODEL CLIENTS SECONDS [PID]`. Each asks again and again, with a prompt of
//! its own, and streams what comes. Then as many leave in the midst of an answer. Prints one JSON object: the
//! clients' rates, the fewest tokens of a client over the most, the time until something comes, and the memory of the server if PID is its process.

use std::error::Error;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// Tokens of an answer.
const TOKENS: usize = 48;

/// How often all clients leave, and how long that may take.
const LEAVES: usize = 5;
const LEAVE_TIME_MAX: Duration = Duration::from_secs(60);

/// What a client saw.
#[derive(Default)]
struct Seen {
    tokens: usize,
    answers: usize,
    /// From a request to the first byte, and to the first token of each answer: seconds.
    first_bytes: Vec<f64>,
    first_tokens: Vec<f64>,
    seconds: f64,
}

#[tokio::main]
async fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().collect();
    let [_, address, model, clients, seconds, rest @ ..] = &args[..] else {
        return Err("usage: load ADDRESS MODEL CLIENTS SECONDS [PID]".into());
    };
    let (clients, seconds): (usize, u64) = (clients.parse()?, seconds.parse()?);
    // Loads the model.
    ask(address, model, 0, &mut Seen::default(), Instant::now()).await?;
    let start = Instant::now();
    let end = start + Duration::from_secs(seconds);
    let all = (0..clients).map(|client| {
        let (address, model) = (address.clone(), model.clone());
        tokio::spawn(async move {
            let mut seen = Seen::default();
            while Instant::now() < end {
                ask(&address, &model, client, &mut seen, start).await?;
            }
            Result::Ok(seen)
        })
    });
    let all: Vec<_> = all.collect();
    let mut rss = Vec::new();
    if let Some(pid) = rest.first() {
        for _ in 0..4 {
            tokio::time::sleep(Duration::from_secs(seconds) / 4).await;
            rss.push(rss_mib(pid)?);
        }
    }
    let mut seen = Vec::new();
    let mut errors = Vec::new();
    for client in all {
        match client.await? {
            Ok(client) => seen.push(client),
            Err(error) => errors.push(error.to_string()),
        }
    }
    let rates: Vec<f64> = seen.iter().map(|seen| seen.tokens as f64 / seen.seconds).collect();
    let tokens = || seen.iter().map(|seen| seen.tokens as f64);
    let fewest = tokens().fold(f64::INFINITY, f64::min);
    let most = tokens().fold(0.0, f64::max);
    let leave_s = least_leave(address, model, clients).await?;
    let of =
        |pick: fn(&Seen) -> &Vec<f64>| quantiles(seen.iter().flat_map(pick).copied().collect());
    println!(
        "{}",
        json!({
            "clients": clients,
            "errors": errors,
            "answers": seen.iter().map(|seen| seen.answers).sum::<usize>(),
            "tok_s": rates.iter().sum::<f64>(),
            "slowest_to_fastest": fewest / most,
            "first_byte_s": of(|seen| &seen.first_bytes),
            "first_token_s": of(|seen| &seen.first_tokens),
            "rss_mib": rss,
            "free_after_leaving_s": leave_s,
        })
    );
    Ok(())
}

/// The least, the median, 99 of 100, and the most.
fn quantiles(mut all: Vec<f64>) -> [f64; 4] {
    all.sort_by(f64::total_cmp);
    let at = |share: f64| all[((all.len() - 1) as f64 * share) as usize];
    [0.0, 0.5, 0.99, 1.0].map(at)
}

fn rss_mib(pid: &str) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib: u64 =
        line.and_then(|line| line.split_whitespace().next()).ok_or("no VmRSS")?.parse()?;
    Ok(kib >> 10)
}

/// Sends a request for text.
async fn send(
    address: &str,
    model: &str,
    client: usize,
    tokens: usize,
) -> Result<BufReader<TcpStream>> {
    let body = json!({
        "model": model,
        "prompt": format!("Chapter {client}. It was a cold evening in November, and the"),
        "raw": true,
        "options": {"num_predict": tokens, "seed": client},
    });
    post(address, "/api/generate", &body).await
}

async fn post(address: &str, path: &str, body: &Value) -> Result<BufReader<TcpStream>> {
    let body = body.to_string();
    let mut stream = TcpStream::connect(address).await?;
    let head = format!(
        "POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all((head + &body).as_bytes()).await?;
    Ok(BufReader::new(stream))
}

async fn ask(
    address: &str,
    model: &str,
    client: usize,
    seen: &mut Seen,
    start: Instant,
) -> Result<()> {
    let asked = Instant::now();
    let mut stream = send(address, model, client, TOKENS).await?;
    let mut line = String::new();
    let mut tokens = 0;
    loop {
        line.clear();
        if stream.read_line(&mut line).await? == 0 {
            return Err("the answer has no end".into());
        }
        if tokens == 0 && line.starts_with("HTTP/1.1") {
            if !line.contains(" 200 ") {
                return Err(line.into());
            }
            seen.first_bytes.push(asked.elapsed().as_secs_f64());
        }
        // Between them are the lengths of chunks.
        if !line.starts_with('{') {
            continue;
        }
        let told: Value = serde_json::from_str(&line)?;
        if told["done"] == true {
            seen.answers += 1;
            seen.tokens += told["eval_count"].as_u64().ok_or("no count")? as usize;
            seen.seconds = start.elapsed().as_secs_f64();
            return Ok(());
        }
        if let Some(error) = told.get("error") {
            return Err(error.to_string().into());
        }
        if tokens == 0 {
            seen.first_tokens.push(asked.elapsed().as_secs_f64());
        }
        tokens += 1;
    }
}

/// The least of some tries, since something else may have the machine's cores when clients leave.
async fn least_leave(address: &str, model: &str, clients: usize) -> Result<f64> {
    let mut least = f64::INFINITY;
    for _ in 0..LEAVES {
        let left = tokio::time::timeout(LEAVE_TIME_MAX, leave(address, model, clients)).await;
        least = least.min(left.map_err(|_| "the server still computes for clients that left")??);
    }
    Ok(least)
}

/// Reads until a line begins with this.
async fn until(stream: &mut BufReader<TcpStream>, begin: char) -> Result<()> {
    let mut line = String::new();
    while !line.starts_with(begin) {
        line.clear();
        if stream.read_line(&mut line).await? == 0 {
            return Err("the answer has no end".into());
        }
    }
    Ok(())
}

/// Clients that leave when they have got something. Seconds until the server computes nothing any more.
async fn leave(address: &str, model: &str, clients: usize) -> Result<f64> {
    // One is computed before the others come, whose turns nobody knows. They all have the head of an answer, which
    // comes while they wait.
    let mut first = send(address, model, 0, 10_000).await?;
    until(&mut first, '{').await?;
    let mut others = Vec::new();
    for client in 1..clients {
        others.push(send(address, model, client, 10_000).await?);
    }
    for other in &mut others {
        until(other, 'H').await?;
    }
    drop((first, others));
    let left = Instant::now();
    loop {
        let mut stream = TcpStream::connect(address).await?;
        stream
            .write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            .await?;
        let mut text = String::new();
        stream.read_to_string(&mut text).await?;
        let is_idle = ["llamacpp:requests_processing 0\n", "llamacpp:requests_deferred 0\n"];
        if is_idle.iter().all(|line| text.contains(line)) {
            return Ok(left.elapsed().as_secs_f64());
        }
    }
}
