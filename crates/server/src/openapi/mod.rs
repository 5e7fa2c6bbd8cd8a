//! `/openapi.json`: all routes in OpenAPI 3.1, with the requests as they are read. `/docs`: the same, to look at.

mod page;
pub(crate) mod schemas;

use std::sync::{Arc, OnceLock};

use axum::http::{HeaderValue, header};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use schemars::generate::SchemaSettings;
use schemars::{JsonSchema, SchemaGenerator};
use serde_json::{Map, Value, json};

use crate::hub::Hub;
use crate::{anthropic, misc, ollama, openai};

pub(crate) fn routes() -> Router<Arc<Hub>> {
    Router::new()
        .route("/openapi.json", get(|| async { Json(document()) }))
        .route("/docs", get(docs))
}

async fn docs() -> Response {
    let mut response = Html(page::page(document())).into_response();
    // It has styles of its own, and loads nothing.
    let policy = HeaderValue::from_static("default-src 'none'; style-src 'unsafe-inline'");
    response.headers_mut().insert(header::CONTENT_SECURITY_POLICY, policy);
    response
}

/// The document, made once.
pub(crate) fn document() -> &'static Value {
    static DOCUMENT: OnceLock<Value> = OnceLock::new();
    DOCUMENT.get_or_init(|| {
        let mut api = Api::new();
        ollama::describe(api.of("Ollama", schemas::ollama_error()));
        openai::describe(api.of("OpenAI", schemas::openai_error()));
        anthropic::describe(api.of("Anthropic", schemas::anthropic_error()));
        misc::describe(api.of("Server", schemas::openai_error()));
        describe(&mut api);
        api.finish()
    })
}

fn describe(api: &mut Api) {
    api.get("/openapi.json", "This document", &[JSON]);
    api.get("/docs", "This document, to look at", &["text/html"]);
}

pub(crate) const JSON: &str = "application/json";
pub(crate) const LINES: &str = "application/x-ndjson";
pub(crate) const EVENTS: &str = "text/event-stream";
pub(crate) const TEXT: &str = "text/plain";

/// The document while it is written.
pub(crate) struct Api {
    paths: Map<String, Value>,
    schemas: SchemaGenerator,
    tag: &'static str,
    /// Schema of the dialect's errors.
    error: Value,
}

impl Api {
    fn new() -> Self {
        let settings = SchemaSettings::draft2020_12().with(|settings| {
            settings.definitions_path = "/components/schemas".into();
            settings.meta_schema = None;
        });
        let schemas = settings.into_generator();
        Self { paths: Map::new(), schemas, tag: "", error: Value::Null }
    }

    /// What comes next is of this dialect.
    fn of(&mut self, tag: &'static str, error: Value) -> &mut Self {
        (self.tag, self.error) = (tag, error);
        self
    }

    /// A route that is asked with a body; its answer is of one of these types.
    pub(crate) fn post<T: JsonSchema>(&mut self, path: &str, about: &str, kinds: &[&str]) {
        let schema = self.schemas.subschema_for::<T>();
        let mut operation = self.operation(about, kinds);
        operation["requestBody"] =
            json!({"required": true, "content": {(JSON): {"schema": schema}}});
        self.add("post", path, operation);
    }

    pub(crate) fn get(&mut self, path: &str, about: &str, kinds: &[&str]) {
        let operation = self.operation(about, kinds);
        self.add("get", path, operation);
    }

    /// A route that refuses whatever it is asked for.
    pub(crate) fn refuses(&mut self, method: &str, path: &str, status: u16, about: &str) {
        let mut operation = self.operation(about, &[]);
        operation["responses"] = json!({});
        operation["responses"][status.to_string()] = match method {
            "head" => json!({"description": about}),
            _ => answer(about, &[JSON], &self.error),
        };
        operation["responses"]["4XX"] = answer("What may not be asked", &[JSON], &self.error);
        self.add(method, path, operation);
    }

    fn operation(&self, about: &str, kinds: &[&str]) -> Value {
        json!({
            "tags": [self.tag],
            "summary": about,
            "responses": {
                "200": answer("The answer", kinds, &json!({})),
                "4XX": answer("What was asked for cannot be", &[JSON], &self.error),
                "5XX": answer("It failed, or there is no room for it now", &[JSON], &self.error),
            },
        })
    }

    fn add(&mut self, method: &str, path: &str, mut operation: Value) {
        // A wildcard is a parameter like any other here.
        let path = path.replace("{*", "{");
        let names = path.split('{').skip(1).filter_map(|rest| rest.split('}').next());
        let parameter = |name| json!({"name": name, "in": "path", "required": true, "schema": {"type": "string"}});
        let parameters: Vec<Value> = names.map(parameter).collect();
        if !parameters.is_empty() {
            operation["parameters"] = parameters.into();
        }
        let item = self.paths.entry(path).or_insert_with(|| json!({}));
        item[method] = operation;
    }

    /// A parameter of the query of the route that was told last as this.
    pub(crate) fn query(&mut self, path: &str, name: &str) {
        let parameter = json!({"name": name, "in": "query", "schema": {"type": "string"}});
        self.paths[path]["get"]["parameters"] = json!([parameter]);
    }

    fn finish(mut self) -> Value {
        let schemas = self.schemas.take_definitions(true);
        let key = |scheme| json!({"type": "http", "scheme": scheme});
        json!({
            "openapi": "3.1.0",
            "info": {
                "title": "tierstream",
                "version": env!("CARGO_PKG_VERSION"),
                "description": "Models over HTTP, in the dialects of Ollama, OpenAI and Anthropic. Fields of a request \
                    that are not listed are passed over.",
                "license": {"name": "MIT OR Apache-2.0", "identifier": "MIT OR Apache-2.0"},
            },
            // A key is needed where the server was started with keys.
            "security": [{}, {"bearer": []}, {"header": []}],
            "paths": self.paths,
            "components": {
                "schemas": schemas,
                "securitySchemes": {
                    "bearer": key("bearer"),
                    "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
                },
            },
        })
    }
}

fn answer(about: &str, kinds: &[&str], schema: &Value) -> Value {
    let content: Map<String, Value> =
        kinds.iter().map(|kind| ((*kind).to_owned(), json!({"schema": schema}))).collect();
    match content.is_empty() {
        true => json!({"description": about}),
        false => json!({"description": about, "content": content}),
    }
}
