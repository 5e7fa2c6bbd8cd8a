//! Who may ask: the host that a request names, the page that it comes from, its key.

use std::net::IpAddr;
use std::sync::Arc;

use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, Uri, header, request};
use axum::middleware::Next;
use axum::response::Response;
use sha2::{Digest, Sha256};
use tower_http::cors::{AllowHeaders, AllowOrigin, Any, CorsLayer};

use crate::error::{ApiError, respond};
use crate::hub::Hub;
use crate::peers;
use crate::settings::Settings;
use crate::ui;

/// Refuses what may not ask, and counts what was answered.
pub(crate) async fn guard(State(hub): State<Arc<Hub>>, request: Request, next: Next) -> Response {
    let route =
        request.extensions().get::<MatchedPath>().map_or("none", MatchedPath::as_str).to_owned();
    let refused = refusal(&hub.settings, &request);
    let response = match refused {
        None => next.run(request).await,
        Some(error) => respond(request.uri().path(), error),
    };
    hub.metrics.answered(&route, response.status().as_u16());
    response
}

fn refusal(settings: &Settings, request: &Request) -> Option<ApiError> {
    let headers = request.headers();
    // Who has a key may call it what they like. On this machine alone names are looked at in any case.
    let names_matter = settings.api_keys.is_empty() || settings.listens.ip().is_loopback();
    if names_matter && !is_named(settings, request.uri(), headers) {
        // A page whose name was made to lead here after it was loaded says its own.
        let why = "this server answers to addresses and local names; the name that a proxy has for it is to be \
                   among the origins: --origins https://NAME (OLLAMA_ORIGINS)";
        return Some(ApiError::new(StatusCode::FORBIDDEN, why));
    }
    if let Some(origin) = headers.get(header::ORIGIN)
        && !allows(settings, origin)
        && !is_same(origin, headers)
    {
        let why = "pages of this origin may not ask; OLLAMA_ORIGINS has those that may";
        return Some(ApiError::new(StatusCode::FORBIDDEN, why));
    }
    let path = request.uri().path();
    // The page asks for the key.
    let public = matches!(path, "/" | "/health" | "/v1/health") || ui::is_page(path);
    if !settings.api_keys.is_empty()
        && !public
        && request.method() != Method::OPTIONS
        && !has_key(settings, headers)
    {
        let why = "an API key is needed: Authorization: Bearer KEY";
        let code = Some("invalid_api_key");
        return Some(ApiError { code, ..ApiError::new(StatusCode::UNAUTHORIZED, why) });
    }
    None
}

/// Whether the host that a request names is this machine's, or one that the user has named.
fn is_named(settings: &Settings, uri: &Uri, headers: &HeaderMap) -> bool {
    let named = headers.get(header::HOST).map(|host| host.to_str().unwrap_or("?"));
    let Some(host) = named.or_else(|| uri.authority().map(|authority| authority.as_str())) else {
        return true;
    };
    let host = without_port(host).to_ascii_lowercase();
    is_local(&host) || settings.origins.iter().any(|origin| is_of_host(origin, &host))
}

/// Whether it is an address or a name that no foreign server can give out.
fn is_local(host: &str) -> bool {
    let address = host.trim_start_matches('[').trim_end_matches(']');
    let own = rustix::system::uname().nodename().to_string_lossy().to_ascii_lowercase();
    address.parse::<IpAddr>().is_ok()
        // Names of a machine or a container beside, of which only the own network knows.
        || (!host.is_empty() && !host.contains('.'))
        || host == own
        || [".localhost", ".local", ".internal"].iter().any(|end| host.ends_with(end))
}

/// Whether pages of that host are among the origins that one of the user's stands for.
fn is_of_host(pattern: &str, host: &str) -> bool {
    if pattern == "*" {
        return true;
    }
    // Those of programs, as moz-extension://*, have no host.
    let Some(("http" | "https", named)) = pattern.split_once("://") else { return false };
    matches(&without_port(named.trim_end_matches('/')).to_ascii_lowercase(), host)
}

fn without_port(host: &str) -> &str {
    let is_port = |port: &str| port == "*" || port.bytes().all(|b| b.is_ascii_digit());
    host.rsplit_once(':').filter(|(_, port)| is_port(port)).map_or(host, |(host, _)| host)
}

/// Whether a page is the server's own: of the host that it asks.
fn is_same(origin: &HeaderValue, headers: &HeaderMap) -> bool {
    let host = origin
        .to_str()
        .ok()
        .and_then(|origin| origin.split_once("://"))
        .map(|(_, host)| host.as_bytes());
    headers.get(header::HOST).is_some_and(|own| host == Some(own.as_bytes()))
}

/// Whether pages of that origin may ask: those of this machine, and those that the user lets.
fn allows(settings: &Settings, origin: &HeaderValue) -> bool {
    let Ok(origin) = origin.to_str() else { return false };
    let (scheme, rest) = origin.split_once("://").unwrap_or((origin, ""));
    let local = match scheme {
        "http" | "https" => {
            matches!(without_port(rest), "localhost" | "127.0.0.1" | "[::1]" | "0.0.0.0")
        }
        // Programs with a page inside.
        "app" | "file" | "tauri" | "vscode-webview" | "vscode-file" => true,
        _ => false,
    };
    local || settings.origins.iter().any(|allowed| matches(allowed, origin))
}

/// `*` stands for any text, once.
fn matches(pattern: &str, origin: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern.trim_end_matches('/') == origin,
        Some((before, after)) => {
            origin.len() >= before.len() + after.len()
                && origin.starts_with(before)
                && origin.ends_with(after)
        }
    }
}

fn has_key(settings: &Settings, headers: &HeaderMap) -> bool {
    let digest = |text: &str| Sha256::digest(text.as_bytes());
    let Some(given) = peers::key(headers).map(digest) else { return false };
    // All are compared, and all bytes of each: how long that takes tells nothing.
    settings.api_keys.iter().fold(false, |found, key| {
        let differing = digest(key).iter().zip(&given).fold(0u8, |all, (a, b)| all | (a ^ b));
        found | (std::hint::black_box(differing) == 0)
    })
}

/// What pages of other origins are told.
pub(crate) fn cors(hub: &Arc<Hub>) -> CorsLayer {
    let hub = hub.clone();
    let allowed = move |origin: &HeaderValue, _: &request::Parts| allows(&hub.settings, origin);
    CorsLayer::new()
        .allow_origin(AllowOrigin::predicate(allowed))
        .allow_methods(Any)
        // A `*` would not stand for Authorization.
        .allow_headers(AllowHeaders::mirror_request())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(origins: &[&str], host: &str) -> bool {
        let origins = origins.iter().map(|&origin| origin.to_owned()).collect();
        let mut headers = HeaderMap::new();
        headers.insert(header::HOST, HeaderValue::from_str(host).expect("a header"));
        is_named(&Settings { origins, ..Settings::default() }, &Uri::from_static("/"), &headers)
    }

    #[test]
    fn names_that_lead_here() {
        for own in [
            "localhost",
            "localhost:11434",
            "127.0.0.1:1",
            "[::1]:80",
            "[::1]",
            "10.0.0.1",
            "a.localhost",
        ] {
            assert!(names(&[], own), "{own}");
        }
        for foreign in [
            "example.com",
            "localhost.example.com:11434",
            "127.0.0.1.example.com",
            "localhost.x",
            "",
        ] {
            assert!(!names(&[], foreign), "{foreign}");
        }
    }

    #[test]
    fn hosts_of_origins() {
        let origins = [
            "https://chat.example/",
            "http://Other.example:8080",
            "https://*.inner.example:*",
            "moz-extension://*",
            "chrome-extension*",
        ];
        for named in ["chat.example", "CHAT.example:8443", "other.example", "a.inner.example"] {
            assert!(names(&origins, named), "{named}");
        }
        for foreign in [
            "evil.example",
            "chat.example.evil",
            "xchat.example",
            "chrome-extension.example",
            "inner.example.evil",
        ] {
            assert!(!names(&origins, foreign), "{foreign}");
        }
        // All pages may ask: that is what it means.
        assert!(names(&["*"], "evil.example"));
    }

    #[test]
    fn pages_that_may_ask() {
        let settings = Settings {
            origins: vec!["https://chat.example".into(), "moz-extension://*".into()],
            ..Settings::default()
        };
        let may =
            |origin: &str| allows(&settings, &HeaderValue::from_str(origin).expect("a header"));
        for own in [
            "http://localhost",
            "https://localhost:3000",
            "http://127.0.0.1:8080",
            "http://[::1]:1",
        ] {
            assert!(may(own), "{own}");
        }
        for listed in ["https://chat.example", "moz-extension://abc", "app://obsidian.md"] {
            assert!(may(listed), "{listed}");
        }
        for foreign in [
            "https://example.com",
            "http://localhost.example.com",
            "null",
            "https://chat.example.evil",
        ] {
            assert!(!may(foreign), "{foreign}");
        }
    }
}
