//! Connections: how many, how long they may take to ask, and to take what they asked for.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::ConnectInfo;
use axum::response::Response;
use hyper::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::timeout;
use tokio_io_timeout::TimeoutStream;

use crate::peers::{Counted, Peers};

/// Connections at the same time.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bounds {
    /// When there are so many and one more comes, those go that wait for their next request, and it takes the
    /// place of the first that ends.
    pub(crate) all: usize,
    /// Of one address; more are closed. That is many for a client, but there may be a proxy with all its clients at it,
    /// or the host of containers.
    pub(crate) of_one: usize,
    /// Of this machine, where a proxy is usual. Some places are left to others in any case.
    pub(crate) local: usize,
}

impl Default for Bounds {
    fn default() -> Self {
        Self { all: 1024, of_one: 256, local: 768 }
    }
}

/// Bytes of a request's headers.
const HEADER_BYTES_MAX: usize = 64 << 10;

/// Time for a request's headers, also for the next one on the same connection.
const HEADER_TIME_MAX: Duration = Duration::from_secs(60);

/// Time in which a client takes some of what it is sent.
const WRITE_TIME_MAX: Duration = Duration::from_secs(60);

/// Time in which clients are told that the server has ended their answers.
const LAST_WORDS_TIME_MAX: Duration = Duration::from_secs(1);

/// Serves connections until `stop`; then answers have `grace` to end, before `end` ends them.
pub(crate) async fn listen(
    listener: TcpListener,
    app: Router,
    bounds: Bounds,
    grace: Duration,
    stop: impl Future<Output = ()>,
    end: impl Future<Output = ()>,
) -> io::Result<()> {
    let places = Arc::new(Semaphore::new(bounds.all));
    let peers = Peers::new(bounds.of_one, bounds.local);
    // Whether connections end when they are idle.
    let (end_idle, _) = watch::channel(false);
    let mut stop = pin!(stop);
    loop {
        let next = next(&listener, &peers, &places, &end_idle);
        let accepted = tokio::select! {
            accepted = next => accepted,
            () = &mut stop => break,
        };
        if let Some(Accepted { stream, address, counted, place }) = accepted {
            let served = serve(connection(stream, address, app.clone()), end_idle.subscribe());
            tokio::spawn(async move {
                served.await;
                drop((counted, place));
            });
        }
    }
    drop(listener);
    end_idle.send_replace(true);
    let all = u32::try_from(bounds.all).unwrap_or(u32::MAX);
    let mut all_ended = pin!(places.acquire_many(all));
    if timeout(grace, &mut all_ended).await.is_err() {
        end.await;
        drop(timeout(LAST_WORDS_TIME_MAX, all_ended).await);
    }
    Ok(())
}

/// A connection that has a place.
struct Accepted {
    stream: TcpStream,
    address: SocketAddr,
    counted: Counted,
    place: OwnedSemaphorePermit,
}

/// The next connection, when there is a place for it; none if it was none or is closed.
async fn next(
    listener: &TcpListener,
    peers: &Arc<Peers>,
    places: &Arc<Semaphore>,
    end_idle: &watch::Sender<bool>,
) -> Option<Accepted> {
    let (stream, address) = match listener.accept().await {
        Ok(accepted) => accepted,
        Err(error) if is_of_one(&error) => return None,
        // Too many files, most likely: some will be closed.
        Err(_) => {
            tokio::time::sleep(Duration::from_millis(100)).await;
            return None;
        }
    };
    let counted = peers.count(address.ip())?;
    if let Ok(place) = places.clone().try_acquire_owned() {
        return Some(Accepted { stream, address, counted, place });
    }
    end_idle.send_replace(true);
    let place = places.clone().acquire_owned().await.ok()?;
    end_idle.send_replace(false);
    Some(Accepted { stream, address, counted, place })
}

/// Whether a connection failed, and not the listener.
fn is_of_one(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}

type Io = TokioIo<Pin<Box<TimeoutStream<TcpStream>>>>;
type Connection = http1::Connection<Io, Service>;

/// All routes, which are told where a request comes from.
struct Service {
    routes: TowerToHyperService<Router>,
    address: SocketAddr,
}

impl hyper::service::Service<Request<Incoming>> for Service {
    type Response = Response;
    type Error = Infallible;
    type Future =
        <TowerToHyperService<Router> as hyper::service::Service<Request<Incoming>>>::Future;

    fn call(&self, mut request: Request<Incoming>) -> Self::Future {
        request.extensions_mut().insert(ConnectInfo(self.address));
        self.routes.call(request)
    }
}

fn connection(stream: TcpStream, address: SocketAddr, app: Router) -> Connection {
    // Tokens are small, and are to be sent as they come.
    drop(stream.set_nodelay(true));
    let mut stream = TimeoutStream::new(stream);
    stream.set_write_timeout(Some(WRITE_TIME_MAX));
    let service = Service { routes: TowerToHyperService::new(app), address };
    http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIME_MAX)
        .max_buf_size(HEADER_BYTES_MAX)
        .serve_connection(TokioIo::new(Box::pin(stream)), service)
}

/// Answers requests until the client ends it, or until idle connections are to end and this one is.
async fn serve(connection: Connection, mut end_idle: watch::Receiver<bool>) {
    let mut connection = pin!(connection);
    tokio::select! {
        _ = &mut connection => return,
        _ = end_idle.wait_for(|&end| end) => {}
    }
    connection.as_mut().graceful_shutdown();
    // Who did not read to the end is gone.
    drop(connection.await);
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use axum::routing::get;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::sync::Notify;

    use super::*;

    /// Serves `/`, and `/held`, which tells that it was asked for, and answers when it is let.
    async fn start(bounds: Bounds) -> (SocketAddr, Arc<[Notify; 2]>) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let held = Arc::<[Notify; 2]>::default();
        let until = held.clone();
        let app = Router::new().route("/", get(|| async { "answer" })).route(
            "/held",
            get(move || async move {
                until[0].notify_one();
                until[1].notified().await;
                "answer"
            }),
        );
        let (stop, end) = (std::future::pending(), std::future::ready(()));
        let served = listen(listener, app, bounds, Duration::ZERO, stop, end);
        tokio::spawn(served);
        (address, held)
    }

    #[tokio::test]
    async fn a_request_knows_where_it_comes_from() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let from =
            |ConnectInfo(from): ConnectInfo<SocketAddr>| async move { format!("{from} answer") };
        let app = Router::new().route("/", get(from));
        let (stop, end) = (std::future::pending(), std::future::ready(()));
        tokio::spawn(listen(listener, app, Bounds::default(), Duration::ZERO, stop, end));
        let mut stream = connect(address).await;
        ask(&mut stream, "/").await;
        let mut got = Vec::new();
        while !got.ends_with(b"answer") {
            assert!(stream.read_buf(&mut got).await.expect("it answers") > 0);
        }
        let own = stream.local_addr().expect("an address");
        assert!(String::from_utf8_lossy(&got).ends_with(&format!("{own} answer")));
    }

    async fn ask(stream: &mut TcpStream, path: &str) {
        let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n");
        stream.write_all(request.as_bytes()).await.expect("it is taken");
    }

    async fn is_answered(stream: &mut TcpStream) -> bool {
        let mut got = Vec::new();
        while !got.ends_with(b"answer") {
            match stream.read_buf(&mut got).await {
                Ok(n) if n > 0 => {}
                _ => return false,
            }
        }
        true
    }

    async fn connect(address: SocketAddr) -> TcpStream {
        TcpStream::connect(address).await.expect("it listens")
    }

    #[tokio::test]
    async fn idle_connections_make_room() {
        let (address, held) = start(Bounds { all: 2, of_one: 9, local: 9 }).await;
        let (mut busy, mut idle) = (connect(address).await, connect(address).await);
        ask(&mut busy, "/held").await;
        held[0].notified().await;
        ask(&mut idle, "/").await;
        assert!(is_answered(&mut idle).await);
        let mut next = connect(address).await;
        ask(&mut next, "/").await;
        assert!(is_answered(&mut next).await);
        assert_eq!(idle.read(&mut [0]).await.expect("the end"), 0);
        // The other one is answered, and ends then.
        held[1].notify_one();
        assert!(is_answered(&mut busy).await);
    }

    #[tokio::test]
    async fn a_peer_has_so_many() {
        let (address, held) = start(Bounds { all: 9, of_one: 9, local: 1 }).await;
        let mut first = connect(address).await;
        ask(&mut first, "/held").await;
        held[0].notified().await;
        let mut second = connect(address).await;
        assert!(!is_answered(&mut second).await);
        held[1].notify_one();
        assert!(is_answered(&mut first).await);
    }
}
