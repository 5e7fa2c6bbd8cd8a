//! Counters in the text format of Prometheus. Those with `llamacpp:` have the names and meanings that they
//! have in llama.cpp's server, so that boards made for it work.

use std::sync::atomic::AtomicU64;
use std::time::Duration;

use prometheus_client::encoding::text::{encode_eof, encode_registry};
use prometheus_client::encoding::{EncodeMetric, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

use crate::engine::{Counters, WAIT_BOUNDS};
use crate::hub::{Hub, Running};

type Seconds = Counter<f64, AtomicU64>;
type Labels = Vec<(&'static str, String)>;

/// What is counted as it happens.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    prompt_tokens: Counter,
    pub(crate) prompt_tokens_cached: Counter,
    prompt_seconds: Seconds,
    tokens_predicted: Counter,
    tokens_predicted_seconds: Seconds,
    decodes: Counter,
    busy_slots: Counter,
    load_seconds: Histogram,
    queue_seconds: Histogram,
    first_token_seconds: Histogram,
    next_token_seconds: Histogram,
    requests: Family<Labels, Counter>,
    waiting_for_model: Gauge,
}

/// A request that waits, until this is dropped.
pub(crate) struct Waiting(Gauge);

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.dec();
    }
}

impl Default for Metrics {
    fn default() -> Self {
        let metrics = Self {
            registry: Registry::default(),
            prompt_tokens: Counter::default(),
            prompt_tokens_cached: Counter::default(),
            prompt_seconds: Counter::default(),
            tokens_predicted: Counter::default(),
            tokens_predicted_seconds: Counter::default(),
            decodes: Counter::default(),
            busy_slots: Counter::default(),
            load_seconds: Histogram::new(exponential_buckets(0.1, 2.0, 12)),
            queue_seconds: Histogram::new(exponential_buckets(0.001, 4.0, 10)),
            first_token_seconds: Histogram::new(exponential_buckets(0.01, 2.0, 14)),
            next_token_seconds: Histogram::new(exponential_buckets(0.001, 2.0, 14)),
            requests: Family::default(),
            waiting_for_model: Gauge::default(),
        };
        metrics.registered()
    }
}

impl Metrics {
    /// Names them. The library adds `_total` to those of counters.
    fn registered(mut self) -> Self {
        let all = &mut self.registry;
        all.register(
            "llamacpp:prompt_tokens",
            "Tokens of prompts that were computed",
            self.prompt_tokens.clone(),
        );
        all.register(
            "llamacpp:prompt_seconds",
            "Time that prompts took",
            self.prompt_seconds.clone(),
        );
        all.register(
            "llamacpp:tokens_predicted",
            "Tokens that were generated",
            self.tokens_predicted.clone(),
        );
        let help = "Time that generating took";
        all.register(
            "llamacpp:tokens_predicted_seconds",
            help,
            self.tokens_predicted_seconds.clone(),
        );
        all.register("llamacpp:n_decode", "Steps of a model", self.decodes.clone());
        let help = "Sequences that those steps computed";
        all.register("tierstream_busy_slots", help, self.busy_slots.clone());
        let help = "Tokens of prompts that did not have to be computed again";
        all.register("tierstream_prompt_tokens_cached", help, self.prompt_tokens_cached.clone());
        all.register(
            "tierstream_model_load_seconds",
            "Time that loading a model took",
            self.load_seconds.clone(),
        );
        let help = "Time that requests waited for a sequence";
        all.register("tierstream_queue_seconds", help, self.queue_seconds.clone());
        let help = "Time from a request to its first token, loading included";
        all.register(
            "tierstream_time_to_first_token_seconds",
            help,
            self.first_token_seconds.clone(),
        );
        let help = "Time from a token to the next";
        all.register(
            "tierstream_inter_token_latency_seconds",
            help,
            self.next_token_seconds.clone(),
        );
        all.register(
            "tierstream_http_requests",
            "Requests, by route and status",
            self.requests.clone(),
        );
        let help = "Requests whose model is loaded, or waits for that";
        all.register("tierstream_requests_waiting_for_model", help, self.waiting_for_model.clone());
        self
    }

    /// A request waits for its model to be loaded.
    pub(crate) fn waits_for_model(&self) -> Waiting {
        self.waiting_for_model.inc();
        Waiting(self.waiting_for_model.clone())
    }

    /// A model was loaded.
    pub(crate) fn loaded(&self, took: Duration) {
        self.load_seconds.observe(took.as_secs_f64());
    }

    /// A request has got a sequence.
    pub(crate) fn waited(&self, time: Duration) {
        self.queue_seconds.observe(time.as_secs_f64());
    }

    /// Tokens of a prompt were computed.
    pub(crate) fn read(&self, tokens: usize, took: Duration) {
        self.prompt_tokens.inc_by(tokens as u64);
        self.prompt_seconds.inc_by(took.as_secs_f64());
    }

    /// Tokens that were drawn were computed, for the next ones.
    pub(crate) fn generated(&self, tokens: usize, took: Duration) {
        self.tokens_predicted.inc_by(tokens as u64);
        self.tokens_predicted_seconds.inc_by(took.as_secs_f64());
    }

    /// A model has computed so many sequences at once.
    pub(crate) fn stepped(&self, sequences: usize) {
        self.decodes.inc();
        self.busy_slots.inc_by(sequences as u64);
    }

    pub(crate) fn first_token(&self, after: Duration) {
        self.first_token_seconds.observe(after.as_secs_f64());
    }

    pub(crate) fn next_token(&self, after: Duration) {
        self.next_token_seconds.observe(after.as_secs_f64());
    }

    /// A request was answered.
    pub(crate) fn answered(&self, route: &str, status: u16) {
        let labels = vec![("route", route.to_owned()), ("status", status.to_string())];
        self.requests.get_or_create(&labels).inc();
    }
}

/// All of them.
pub(crate) fn text(hub: &Hub) -> String {
    let mut text = String::new();
    let now = of_now(hub);
    let written = encode_registry(&mut text, &hub.metrics.registry)
        .and_then(|()| encode_registry(&mut text, &now))
        .and_then(|()| encode_eof(&mut text));
    written.expect("a string takes all that is written");
    text
}

/// What is so now.
fn of_now(hub: &Hub) -> Registry {
    let models = hub.loaded();
    let mut all = Registry::default();
    let (active, queued) =
        models.iter().map(|model| model.requests()).fold((0, 0), |a, b| (a.0 + b.0, a.1 + b.1));
    let mut gauge = |name: &str, help: &str, value: usize| {
        let gauge = Gauge::<i64>::default();
        gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
        all.register(name, help, gauge);
    };
    gauge("llamacpp:requests_processing", "Requests that have a sequence", active);
    gauge("llamacpp:requests_deferred", "Requests that wait for one", queued);
    gauge("tierstream_models_loaded", "Models that are loaded", models.len());
    let kept = usize::try_from(hub.prompts.used_bytes()).unwrap_or(usize::MAX);
    gauge("tierstream_prompt_cache_bytes", "Bytes of memory that kept prompts have", kept);
    let steps = hub.metrics.decodes.get().max(1);
    let share = Gauge::<f64, AtomicU64>::default();
    share.set(hub.metrics.busy_slots.get() as f64 / steps as f64);
    all.register("llamacpp:n_busy_slots_per_decode", "Sequences that a step computed", share);
    of_models(&models, &mut all);
    all
}

/// How long computing waited for experts, of each model.
#[derive(Debug)]
struct Waits(Vec<(Labels, Counters)>);

impl EncodeMetric for Waits {
    fn encode(&self, mut encoder: MetricEncoder) -> std::fmt::Result {
        for (labels, counters) in &self.0 {
            let bounds = WAIT_BOUNDS.iter().copied().chain([f64::MAX]);
            let buckets: Vec<(f64, u64)> = bounds.zip(counters.waits).collect();
            let count = counters.waits.iter().sum();
            let mut encoder = encoder.encode_family(labels)?;
            encoder.encode_histogram::<NoLabelSet>(
                counters.waited_seconds,
                count,
                &buckets,
                None,
            )?;
        }
        Ok(())
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Histogram
    }
}

fn of_models(models: &[std::sync::Arc<Running>], all: &mut Registry) {
    let requests = Family::<Labels, Counter>::default();
    let [bytes, evictions, reads] = [(); 3].map(|()| Family::<Labels, Counter>::default());
    let [pool, memory, in_flight] = [(); 3].map(|()| Family::<Labels, Gauge>::default());
    let times = Family::<Labels, Gauge<f64, AtomicU64>>::default();
    let whole = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
    let mut waits = Vec::new();
    for model in models {
        let counters = model.counters();
        let plain: Labels = vec![("model", model.found.name.clone())];
        waits.push((plain.clone(), counters));
        let label = |key, value: &str| [&plain[..], &[(key, value.to_owned())]].concat();
        let tiers = [
            ("vram", counters.from_vram),
            ("ram", counters.from_ram),
            ("nvme", counters.from_drive),
        ];
        for (tier, n) in tiers {
            requests.get_or_create(&label("tier", tier)).inc_by(n);
        }
        bytes.get_or_create(&plain).inc_by(counters.bytes_read);
        evictions.get_or_create(&plain).inc_by(counters.evictions);
        reads.get_or_create(&plain).inc_by(counters.reads);
        in_flight.get_or_create(&plain).set(whole(counters.reads_in_flight));
        let [vram, ram] = ["vram", "ram"].map(|tier| label("tier", tier));
        pool.get_or_create(&vram).set(whole(counters.vram_pool_bytes));
        pool.get_or_create(&ram).set(whole(counters.ram_pool_bytes));
        memory.get_or_create(&vram).set(whole(model.vram_bytes));
        memory.get_or_create(&ram).set(whole(model.ram_bytes));
        times.get_or_create(&label("quantile", "0.5")).set(counters.read_seconds.0);
        times.get_or_create(&label("quantile", "0.99")).set(counters.read_seconds.1);
    }
    all.register("tierstream_expert_requests", "Routed experts, by where they were", requests);
    all.register("tierstream_expert_read_bytes", "Bytes of experts that were read", bytes);
    all.register("tierstream_expert_evictions", "Records of experts that gave way", evictions);
    let help =
        "Time that computing waited for experts, each time that it needed some that were not there";
    all.register("tierstream_expert_wait_seconds", help, Waits(waits));
    all.register("tierstream_io_reads", "Reads that the drive has done", reads);
    all.register("tierstream_io_queue_depth", "Reads that the drive has", in_flight);
    all.register("tierstream_io_read_seconds", "Time that reads took at most", times);
    all.register("tierstream_pool_bytes", "Bytes of memory that experts have", pool);
    all.register("tierstream_model_bytes", "Bytes of memory that a model has", memory);
}
