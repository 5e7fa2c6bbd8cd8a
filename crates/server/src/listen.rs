//! Connections: how many, how long they may take to ask, and to take what they asked for.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_io_timeout::TimeoutStream;

/// Connections at the same time; others wait.
const CONNECTIONS_MAX: usize = 1024;

/// Bytes of a request's headers.
const HEADER_BYTES_MAX: usize = 64 << 10;

/// Time for a request's headers, also for the next one on the same connection.
const HEADER_TIME_MAX: Duration = Duration::from_secs(60);

/// Time in which a client takes some of what it is sent.
const WRITE_TIME_MAX: Duration = Duration::from_secs(60);

/// Serves connections until `stop`; then answers have `grace` to end.
pub(crate) async fn listen(
    listener: TcpListener,
    app: Router,
    grace: Duration,
    stop: impl Future<Output = ()>,
) -> io::Result<()> {
    let connections = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let graceful = GracefulShutdown::new();
    let mut stop = std::pin::pin!(stop);
    loop {
        let next = async {
            let permit = connections.clone().acquire_owned().await;
            (listener.accept().await, permit)
        };
        let (accepted, permit) = tokio::select! {
            next = next => next,
            () = &mut stop => break,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) if is_of_one(&error) => continue,
            // Too many files, most likely: some will be closed.
            Err(_) => {
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let watched = graceful.watch(connection(stream, app.clone()));
        tokio::spawn(async move {
            drop(watched.await);
            drop(permit);
        });
    }
    drop(listener);
    drop(tokio::time::timeout(grace, graceful.shutdown()).await);
    Ok(())
}

/// Whether a connection failed, and not the listener.
fn is_of_one(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}

type Io = TokioIo<std::pin::Pin<Box<TimeoutStream<TcpStream>>>>;
type Connection = http1::Connection<Io, Service>;
type Service = TowerToHyperService<Router>;

fn connection(stream: TcpStream, app: Router) -> Connection {
    // Tokens are small, and are to be sent as they come.
    drop(stream.set_nodelay(true));
    let mut stream = TimeoutStream::new(stream);
    stream.set_write_timeout(Some(WRITE_TIME_MAX));
    http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIME_MAX)
        .max_buf_size(HEADER_BYTES_MAX)
        .serve_connection(TokioIo::new(Box::pin(stream)), TowerToHyperService::new(app))
}
