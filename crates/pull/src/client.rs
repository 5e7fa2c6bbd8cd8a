//! Requests: where the token goes, redirects, and what a failure means.

use std::io;
use std::net::IpAddr;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use tierstream_store::Secret;
use ureq::http::{HeaderMap, Request, Response, StatusCode, Uri, header};
use ureq::tls::{RootCerts, TlsConfig};
use ureq::{Agent, Body};

use crate::error::{Error, Result};
use crate::limits;
use crate::tries::Failure;

/// Time for a connection, and for an answer to begin.
const CONNECT_TIME: Duration = Duration::from_secs(30);

/// How a request is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Method {
    Get,
    Head,
}

/// The hub, as one pull speaks with it.
#[derive(Debug)]
pub(crate) struct Client {
    pub(crate) agent: Agent,
    pub(crate) endpoint: Uri,
    token: Option<Secret>,
}

impl Client {
    /// `idle` is the time after which a connection counts as cut that brings nothing.
    pub(crate) fn new(endpoint: Uri, token: Option<Secret>, idle: Duration) -> Self {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let tls = TlsConfig::builder()
            .unversioned_rustls_crypto_provider(provider)
            .root_certs(RootCerts::PlatformVerifier)
            .build();
        let config = Agent::config_builder()
            .tls_config(tls)
            .user_agent(concat!("tierstream/", env!("CARGO_PKG_VERSION")))
            .accept_encoding("identity")
            .http_status_as_error(false)
            // They are followed here: each one may go to another host, which gets no token.
            .max_redirects(0)
            .max_redirects_will_error(false)
            .max_response_header_size(limits::MAX_HEADER_BYTES)
            .input_buffer_size(256 << 10)
            .timeout_resolve(Some(CONNECT_TIME))
            .timeout_connect(Some(CONNECT_TIME))
            .timeout_recv_response(Some(CONNECT_TIME.max(idle)))
            .timeout_per_read(Some(idle))
            .timeout_per_write(Some(idle))
            .build();
        let token = token.filter(|_| may_have_token(&endpoint));
        Self { agent: config.new_agent(), endpoint, token }
    }

    /// The address of `path` at the hub, which begins with a slash.
    pub(crate) fn at(&self, path: &str) -> Result<Uri> {
        let base = self.endpoint.to_string();
        let text = format!("{}{path}", base.trim_end_matches('/'));
        Uri::try_from(&text).map_err(|_| Error::Endpoint(base))
    }

    /// The answer to a request, and where it came from in the end. Redirects within the same host are
    /// followed, and others only with `anywhere`: without it, the redirect is the answer.
    pub(crate) fn send(
        &self,
        method: Method,
        uri: &Uri,
        range: Option<&Range<u64>>,
        anywhere: bool,
    ) -> Result<(Response<Body>, Uri), Failure> {
        let mut uri = uri.clone();
        for _ in 0..=limits::MAX_REDIRECTS {
            let response = self.send_once(method, &uri, range)?;
            if !response.status().is_redirection() {
                return Ok((response, uri));
            }
            let target = target(&uri, response.headers())?;
            if origin(&target) != origin(&uri) && !anywhere {
                return Ok((response, uri));
            }
            uri = target;
        }
        Err(answer(&uri, format!("with more than {} redirects", limits::MAX_REDIRECTS)).into())
    }

    fn send_once(
        &self,
        method: Method,
        uri: &Uri,
        range: Option<&Range<u64>>,
    ) -> Result<Response<Body>, Failure> {
        let mut request = match method {
            Method::Get => Request::get(uri.clone()),
            Method::Head => Request::head(uri.clone()),
        };
        if let Some(range) = range {
            let range = format!("bytes={}-{}", range.start, range.end - 1);
            request = request.header(header::RANGE, range);
        }
        if let Some(token) = &self.token
            && origin(uri) == origin(&self.endpoint)
        {
            request = request.header(header::AUTHORIZATION, format!("Bearer {}", token.reveal()));
        }
        let request = request.body(()).map_err(|_| Error::Token)?;
        self.agent.run(request).map_err(|error| failed(uri, error))
    }
}

/// A request that got no answer, or one that ended early.
pub(crate) fn failed(uri: &Uri, error: ureq::Error) -> Failure {
    let what = match &error {
        ureq::Error::Io(error) if is_tls(error) => return lasting(uri, error.to_string()),
        ureq::Error::Rustls(_) | ureq::Error::Tls(_) => return lasting(uri, error.to_string()),
        ureq::Error::HostNotFound => "there is no such host".to_owned(),
        ureq::Error::Timeout(_) => "it does not answer".to_owned(),
        error => error.to_string(),
    };
    passing(uri, what)
}

/// A connection that broke.
pub(crate) fn broken(uri: &Uri, error: &io::Error) -> Failure {
    passing(uri, format!("the connection was cut: {error}"))
}

pub(crate) fn passing(uri: &Uri, what: String) -> Failure {
    let error = Error::Unreachable { host: host(uri), what };
    Failure::Passing { error, retry_after: None }
}

fn lasting(uri: &Uri, what: String) -> Failure {
    Failure::Final(Error::Unreachable { host: host(uri), what })
}

fn is_tls(error: &io::Error) -> bool {
    error.get_ref().is_some_and(|inner| inner.is::<rustls::Error>())
}

pub(crate) fn answer(uri: &Uri, what: impl Into<String>) -> Error {
    Error::Answer { host: host(uri), what: what.into() }
}

/// What an answer means that is no success.
pub(crate) fn refused(uri: &Uri, response: &Response<Body>, repo: &str) -> Failure {
    let status = response.status();
    let code = text(response.headers(), "x-error-code").unwrap_or_default();
    let message = text(response.headers(), "x-error-message");
    let shown = match message {
        Some(message) => format!("{status}: {}", shown(message)),
        None => status.to_string(),
    };
    match (status, code) {
        (_, "GatedRepo") => Error::Gated(repo.to_owned()).into(),
        (_, "RepoNotFound") => Error::NoRepository(repo.to_owned()).into(),
        (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN, _) => Error::Refused(shown).into(),
        (StatusCode::NOT_FOUND, _) => Error::NoRepository(repo.to_owned()).into(),
        _ if is_passing(status) => {
            let seconds =
                text(response.headers(), "retry-after").and_then(|text| text.parse().ok());
            let error =
                Error::Unreachable { host: host(uri), what: format!("it answered {shown}") };
            Failure::Passing { error, retry_after: seconds.map(Duration::from_secs) }
        }
        _ => answer(uri, shown).into(),
    }
}

fn is_passing(status: StatusCode) -> bool {
    status.is_server_error()
        || matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT)
}

/// A header that is a text.
pub(crate) fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

/// As much as is told of a server's message.
fn shown(message: &str) -> String {
    message.chars().filter(|c| !c.is_control()).take(200).collect()
}

/// Where a redirect leads.
fn target(from: &Uri, headers: &HeaderMap) -> Result<Uri> {
    let wrong = || answer(from, "with a redirect that leads nowhere");
    let location = text(headers, "location").ok_or_else(wrong)?;
    let (scheme, authority) = (from.scheme_str().unwrap_or(""), from.authority());
    let authority = authority.map_or("", |a| a.as_str());
    let whole = match location {
        path if path.starts_with("//") => format!("{scheme}:{path}"),
        path if path.starts_with('/') => format!("{scheme}://{authority}{path}"),
        whole => whole.to_owned(),
    };
    // A fragment is the client's own matter.
    let whole = whole.split('#').next().unwrap_or_default();
    let to = Uri::try_from(whole).map_err(|_| wrong())?;
    match (scheme, to.scheme_str()) {
        (_, Some("https")) if to.host().is_some() => Ok(to),
        ("http", Some("http")) if to.host().is_some() => Ok(to),
        ("https", Some("http")) => Err(answer(from, "with a redirect that leaves HTTPS")),
        _ => Err(wrong()),
    }
}

/// Scheme, host and port: who a request goes to.
fn origin(uri: &Uri) -> (Option<&str>, Option<String>, Option<u16>) {
    let scheme = uri.scheme_str();
    let port = uri.port_u16().or(if scheme == Some("https") { Some(443) } else { Some(80) });
    (scheme, uri.host().map(str::to_ascii_lowercase), port)
}

/// Whether others on the way cannot read the token.
fn may_have_token(endpoint: &Uri) -> bool {
    endpoint.scheme_str() == Some("https") || endpoint.host().is_some_and(is_loopback)
}

fn is_loopback(host: &str) -> bool {
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host.eq_ignore_ascii_case("localhost") || host.parse().is_ok_and(|ip: IpAddr| ip.is_loopback())
}

fn host(uri: &Uri) -> String {
    uri.authority().map_or_else(|| uri.to_string(), |authority| authority.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uri(text: &str) -> Uri {
        text.parse().unwrap()
    }

    fn leads(from: &str, location: &str) -> Option<String> {
        let headers = [(header::LOCATION, location.parse().unwrap())].into_iter().collect();
        target(&uri(from), &headers).ok().map(|uri| uri.to_string())
    }

    #[test]
    fn redirects_lead_to_servers_and_not_out_of_tls() {
        let to = |text: &str| Some(text.to_owned());
        assert_eq!(leads("https://a/b", "/c?d"), to("https://a/c?d"));
        assert_eq!(leads("https://a/b", "//e/c"), to("https://e/c"));
        assert_eq!(leads("https://a/b", "https://e:1/c#f"), to("https://e:1/c"));
        assert_eq!(leads("http://a/b", "https://a/c"), to("https://a/c"));
        assert_eq!(leads("http://a/b", "http://e/c"), to("http://e/c"));
        for other in ["http://a/b", "file:///etc/passwd", "ftp://a/b", "c", ""] {
            assert_eq!(leads("https://a/b", other), None, "{other}");
        }
    }

    #[test]
    fn tokens_go_only_where_nobody_else_reads_them() {
        for open in ["http://hub.example", "http://10.0.0.1:8080", "http://localhost.example"] {
            assert!(!may_have_token(&uri(open)), "{open}");
        }
        for safe in
            ["https://hub.example", "http://127.0.0.1:1", "http://[::1]:1", "http://localhost"]
        {
            assert!(may_have_token(&uri(safe)), "{safe}");
        }
    }

    #[test]
    fn origins_are_scheme_host_and_port() {
        let same = |a: &str, b: &str| origin(&uri(a)) == origin(&uri(b));
        assert!(same("https://A/x", "https://a:443/y") && same("http://a", "http://a:80"));
        assert!(!same("https://a", "https://a:444") && !same("https://a", "http://a:443"));
        assert!(!same("https://a", "https://a.b"));
    }
}
