//! A server of scripted models, asked without a network or over a connection.

#![allow(dead_code)]

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::ConnectInfo;
use axum::http::{Request, StatusCode, header};
use serde_json::Value;
use tempfile::TempDir;
use tierstream_script::Script;
use tierstream_server::engine::Extra;
use tierstream_server::{Server, Settings};
use tierstream_store::{Environment, Store};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tower::ServiceExt;

/// A chat template that knows tools and thinking.
pub(crate) const TEMPLATE: &str = "\
{%- if tools %}<|im_start|>system
You may call:
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}
Answer a call as <tool_call>
{\"name\": ..., \"arguments\": ...}
</tool_call><|im_end|>
{% endif -%}
{%- for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}
{%- for call in m.tool_calls or [] %}<tool_call>
{\"name\": \"{{ call.function.name }}\", \"arguments\": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}{% endif -%}";

/// Scripted models `one` and `two`, and a server of them.
pub(crate) struct Fixture {
    folder: PathBuf,
    _own: Option<TempDir>,
    pub(crate) router: Router,
    server: Option<Server>,
}

impl Fixture {
    pub(crate) fn new(engine: Script) -> Self {
        Self::with(engine, Settings::default())
    }

    pub(crate) fn with(engine: Script, settings: Settings) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let fixture = Self::within(&folder, engine, settings);
        Self { _own: Some(folder), ..fixture }
    }

    /// With its models in a folder of the caller's.
    pub(crate) fn within(folder: &TempDir, engine: Script, settings: Settings) -> Self {
        Self::beside(&Environment::default(), folder, engine, settings)
    }

    /// With the models of an environment's stores beside them.
    pub(crate) fn beside(
        environment: &Environment,
        folder: &TempDir,
        engine: Script,
        settings: Settings,
    ) -> Self {
        let folder = folder.path().to_owned();
        let extra = |name: &str| {
            let path = folder.join(format!("{name}.gguf"));
            write_model(&path, Some(TEMPLATE));
            Extra { name: name.into(), path }
        };
        let extras = vec![extra("one"), extra("two"), extra("spare")];
        let store = Store::new(environment);
        let server = Server::new(Arc::new(engine), store, extras, settings);
        Self { folder, _own: None, router: server.router(), server: Some(server) }
    }

    pub(crate) fn path(&self, model: &str) -> PathBuf {
        self.folder.join(format!("{model}.gguf"))
    }

    /// The status and the body of an answer.
    pub(crate) async fn send(&self, request: Request<Body>) -> (StatusCode, String) {
        let response = self.router.clone().oneshot(request).await.expect("routers do not fail");
        let status = response.status();
        let body = axum::body::to_bytes(response.into_body(), 64 << 20).await.expect("a body");
        (status, String::from_utf8(body.to_vec()).expect("text"))
    }

    pub(crate) async fn post(&self, path: &str, body: Value) -> (StatusCode, Value) {
        let (status, text) = self.send(post(path, &body)).await;
        (status, serde_json::from_str(&text).unwrap_or(Value::String(text)))
    }

    pub(crate) async fn get(&self, path: &str) -> (StatusCode, Value) {
        let request = Request::get(path)
            .header(header::HOST, "localhost")
            .body(Body::empty())
            .expect("valid");
        let (status, text) = self.send(request).await;
        (status, serde_json::from_str(&text).unwrap_or(Value::String(text)))
    }

    /// The lines of an answer of lines.
    pub(crate) async fn lines(&self, path: &str, body: Value) -> Vec<Value> {
        let (status, text) = self.send(post(path, &body)).await;
        assert_eq!(status, StatusCode::OK, "{text}");
        text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
    }

    /// The data of an answer of events, without the last.
    pub(crate) async fn events(&self, path: &str, body: Value) -> Vec<Value> {
        let (status, text) = self.send(post(path, &body)).await;
        assert_eq!(status, StatusCode::OK, "{text}");
        let mut data: Vec<&str> =
            text.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
        assert_eq!(data.pop(), Some("[DONE]"));
        data.into_iter().map(|data| serde_json::from_str(data).expect("JSON")).collect()
    }

    /// A value of `/metrics`.
    pub(crate) async fn metric(&self, name: &str) -> f64 {
        let Value::String(text) = self.get("/metrics").await.1 else { panic!("no metrics") };
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("{name} is not there")).parse().expect("a number")
    }

    /// Listens, until what is returned is dropped or told to stop.
    pub(crate) async fn listen(&mut self) -> Listening {
        let listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0))).await;
        self.listen_at(listener.expect("a port"))
    }

    /// Listens there.
    pub(crate) fn listen_at(&mut self, listener: TcpListener) -> Listening {
        let address = listener.local_addr().expect("an address");
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let server = self.server.take().expect("it listens once");
        let task = tokio::spawn(server.run(listener, async { drop(stopped.await) }));
        Listening { address, stop, task }
    }
}

pub(crate) struct Listening {
    pub(crate) address: SocketAddr,
    pub(crate) stop: tokio::sync::oneshot::Sender<()>,
    pub(crate) task: tokio::task::JoinHandle<std::io::Result<()>>,
}

impl Listening {
    /// Sends a request, and returns what can be read from then on.
    pub(crate) async fn begin(&self, path: &str, body: &Value) -> TcpStream {
        let mut stream = TcpStream::connect(self.address).await.expect("it listens");
        send(&mut stream, path, body).await;
        stream
    }
}

/// Sends a request.
pub(crate) async fn send(stream: &mut TcpStream, path: &str, body: &Value) {
    let body = body.to_string();
    let head = format!(
        "POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all((head + &body).as_bytes()).await.expect("it reads");
}

/// Reads on until this text has come.
pub(crate) async fn read_until(stream: &mut TcpStream, text: &str) -> String {
    let mut got = String::new();
    let mut buffer = [0; 4096];
    while !got.contains(text) {
        let n = stream.read(&mut buffer).await.expect("it answers");
        assert!(n > 0, "the end came after {got:?}");
        got += &String::from_utf8_lossy(&buffer[..n]);
    }
    got
}

pub(crate) fn post(path: &str, body: &Value) -> Request<Body> {
    let request = Request::post(path).header(header::HOST, "localhost");
    request.body(Body::from(body.to_string())).expect("valid")
}

/// A request that comes from such an address.
pub(crate) fn from(address: [u8; 4], mut request: Request<Body>) -> Request<Body> {
    request.extensions_mut().insert(ConnectInfo(SocketAddr::from((address, 1))));
    request
}

/// Tokens of context that models say they were trained with.
pub(crate) const TRAINED: u32 = 1 << 17;

/// A GGUF of a header alone.
pub(crate) fn write_model(path: &Path, template: Option<&str>) {
    let mut bytes = b"GGUF".to_vec();
    let keys = [("general.architecture", Some("llama")), ("tokenizer.chat_template", template)];
    let keys: Vec<_> = keys.into_iter().filter_map(|(key, value)| Some((key, value?))).collect();
    bytes.extend(3u32.to_le_bytes());
    bytes.extend(0u64.to_le_bytes());
    bytes.extend((keys.len() as u64 + 1).to_le_bytes());
    let text = |bytes: &mut Vec<u8>, text: &str| {
        bytes.extend((text.len() as u64).to_le_bytes());
        bytes.extend(text.as_bytes());
    };
    for (key, value) in keys {
        text(&mut bytes, key);
        bytes.extend(8u32.to_le_bytes());
        text(&mut bytes, value);
    }
    text(&mut bytes, "llama.context_length");
    bytes.extend(4u32.to_le_bytes());
    bytes.extend(TRAINED.to_le_bytes());
    std::fs::write(path, bytes).expect("it can be written");
}
