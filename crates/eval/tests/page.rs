//! The page: its numbers are those of the metrics and the simulator, and no trace breaks it.

use std::path::Path;

use roxmltree::{Document, Node, ParsingOptions};
use tierstream_eval::metrics::{Options, metrics};
use tierstream_eval::page::{Made, Plan, Study, html, quoted};
use tierstream_eval::sim::{Curve, PoolKind, Setup, Size, curve};
use tierstream_eval::{Assume, Header, NO_EXPERT, Phase, Token, Trace, read};

fn options() -> Options {
    Options { resamples: 50, ..Options::default() }
}

fn public(name: &str) -> Trace {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name);
    read(&path, Assume::default()).unwrap()
}

fn made() -> Made {
    Made { version: "1.2.3".to_owned(), command: "tierstream eval report <t> & u".to_owned() }
}

fn page(trace: &Trace) -> String {
    html(&[Study::of("t.parquet", trace, &options(), None).unwrap()], None, &made())
}

fn parsed(page: &str) -> Document<'_> {
    let options = ParsingOptions { allow_dtd: true, ..ParsingOptions::default() };
    Document::parse_with_options(page, options).expect("the page is well-formed")
}

fn text(node: Node<'_, '_>) -> String {
    node.descendants().filter(Node::is_text).filter_map(|n| n.text()).collect()
}

/// Titles and rows of the table of this name.
fn table(document: &Document<'_>, caption: &str) -> Vec<Vec<String>> {
    let of_name = |node: &Node<'_, '_>| {
        let own = node.children().find(|child| child.has_tag_name("caption"));
        node.has_tag_name("table") && own.is_some_and(|own| text(own) == caption)
    };
    let table = document.descendants().find(of_name).expect(caption);
    let rows = table.descendants().filter(|node| node.has_tag_name("tr"));
    rows.map(|row| row.children().filter(Node::is_element).map(text).collect()).collect()
}

fn percent(share: Option<f64>) -> String {
    share.map_or("–".to_owned(), |share| format!("{:.1} %", 100.0 * share))
}

/// A trace of one prompt, in which each token uses the experts from its number on.
fn rolling(header: Header, tokens: u32, domain: &str) -> Trace {
    let layers = header.layers.clone();
    let mut trace = Trace::new(header).unwrap();
    let domain = trace.domains_mut().number(domain).unwrap();
    for position in 0..tokens {
        let row: Vec<u16> = layers
            .iter()
            .flat_map(|layer| (0..layer.used).map(move |n| ((position + n) % layer.experts) as u16))
            .collect();
        let phase = Phase::Decode;
        trace
            .push(
                Token { prompt: 0, position, batch: position, id: None, phase, domain },
                &row,
                &[],
            )
            .unwrap();
    }
    trace
}

#[test]
fn hit_rates_are_those_of_the_simulator() {
    let trace = public("qwen.parquet");
    let study = Study::of("t.parquet", &trace, &options(), None).unwrap();
    let page = html(std::slice::from_ref(&study), None, &made());
    let document = parsed(&page);
    let tables: Vec<_> = document
        .descendants()
        .filter(|node| node.has_tag_name("table"))
        .filter(|table| text(*table).contains("Hits of requests"))
        .collect();
    assert_eq!(tables.len(), 2);
    for (table, pool) in tables.into_iter().zip([PoolKind::PerLayer, PoolKind::Global]) {
        let sizes: Vec<Size> = study.slots().iter().map(|&slots| Size::Slots(slots)).collect();
        let own = study.report().curves.iter().filter(|curve| curve.setup.pool == pool);
        let anew = own.map(|found| {
            let setup = Setup { pool, eviction: found.setup.eviction, ..Setup::default() };
            let anew = curve(&trace, &setup, &sizes).unwrap();
            assert_eq!(&anew, found);
            anew
        });
        let mut curves: Vec<Curve> = anew.collect();
        assert!(curves.len() >= 4);
        if pool == PoolKind::PerLayer {
            curves.extend([study.shuffled().clone(), study.uniform().clone()]);
        }
        let rows = table.descendants().filter(|node| node.has_tag_name("tr")).skip(1);
        let mut lines = 0;
        for (index, row) in rows.enumerate() {
            let cells: Vec<String> = row.children().filter(Node::is_element).map(text).collect();
            assert_eq!(cells[1], study.slots()[index].to_string());
            let rates: Vec<String> =
                curves.iter().map(|c| percent(c.points[index].hit_rate())).collect();
            assert_eq!(cells[3..], rates);
            lines += 1;
        }
        assert_eq!(lines, study.slots().len());
    }
}

#[test]
fn other_numbers_are_those_of_the_metrics() {
    let trace = public("olmoe.parquet");
    let report = metrics(&trace, &options()).unwrap();
    let study = Study::of("t.parquet", &trace, &options(), None).unwrap();
    let page = html(std::slice::from_ref(&study), None, &made());
    let document = parsed(&page);
    let controls = report.controls.as_ref().unwrap();
    let lru = |of: &Curve, rho: u32| {
        let mut points = of.points.iter();
        percent(points.find(|point| point.rho == f64::from(rho)).unwrap().hit_rate())
    };
    for (row, headline, curve) in
        [(2, &controls.shuffled, study.shuffled()), (3, &controls.uniform, study.uniform())]
    {
        let found = &table(&document, "Reuse, and hits of LRU")[row];
        assert_eq!(found[1], percent(headline.locality.reuse_next));
        for (cell, rho) in found[2..].iter().zip([1, 2, 4]) {
            assert_eq!(*cell, percent(headline.lru[&rho.to_string()]));
            assert_eq!(*cell, lru(curve, rho));
        }
    }
    let trace_row = &table(&document, "Reuse, and hits of LRU")[1];
    assert_eq!(
        trace_row[1..],
        ["43.5 %", "43.4 %", "59.8 %", "79.4 %"],
        "published, but for the order of a step"
    );
    let srp = table(&document, "SRP");
    assert_eq!(srp[2][..2], ["16".to_owned(), percent(report.locality.srp["16"].map(|s| s.srp))]);
    let unique = table(&document, "Distinct experts");
    let told = [report.locality.unique["64"].unwrap(), report.uniform_unique["64"]];
    assert_eq!(
        [&unique[3][1], &unique[3][3]],
        [&format!("{:.1}", told[0]), &format!("{:.1}", told[1])]
    );
    let layers = table(&document, "Each layer");
    assert_eq!(layers.len(), 1 + report.per_layer.len());
    for (row, layer) in layers[1..].iter().zip(&report.per_layer) {
        assert_eq!(row[2], percent(layer.locality.reuse_next));
        assert_eq!(row[9], layer.working_set.to_string());
    }
    let reuse = table(&document, "Repeated uses by distance");
    let uses: u64 =
        reuse[1..].iter().map(|row| row[1].replace(',', "").parse::<u64>().unwrap()).sum();
    let all: u64 = (0..trace.len())
        .map(|token| trace.row(token).iter().filter(|&&e| e != NO_EXPERT).count() as u64)
        .sum();
    let first: usize = report.per_layer.iter().map(|layer| layer.working_set).sum();
    assert_eq!(uses, all - first as u64, "every use of one prompt is a first or a repeated one");
    let next = percent(report.predict.next_layer.recall);
    assert_eq!(table(&document, "Guesses")[2][1], next);
}

#[test]
fn what_the_findings_say() {
    let page = page(&public("olmoe.parquet"));
    let document = parsed(&page);
    let rows = table(&document, "Hits of requests");
    let quarter = rows.iter().find(|row| row[0] == "25 %").unwrap();
    let column = |name: &str| rows[0].iter().position(|title| title == name).unwrap();
    let (lru, best) = (&quarter[column("LRU")], &quarter[column("Belady, the optimum")]);
    let findings: Vec<String> = document
        .descendants()
        .find(|node| node.attribute("class") == Some("findings"))
        .unwrap()
        .children()
        .map(text)
        .collect();
    let uniform = &quarter[column("LRU, uniform routing")];
    let told = format!(
        "A pool of 25 % of the experts (16 slots per layer) answers {lru} of requests with LRU; the optimum {best}; \
         uniform routing would give {uniform}."
    );
    assert_eq!(findings[0], told);
    assert!(findings.iter().any(|text| text.contains("time is worth ")), "{findings:?}");
}

#[test]
fn strings_of_a_trace_are_no_markup() {
    let hostile = "</title></style><script>alert(1)</script>\"'&\u{202e}\0";
    let mut header = Header::uniform(2, 8, 2);
    header.model.name = hostile.to_owned();
    header.model.hash = Some(hostile.to_owned());
    header.model.architecture = Some(hostile.to_owned());
    header.source = hostile.to_owned();
    let trace = rolling(header, 40, hostile);
    let studies: Vec<Study> = (0..2)
        .map(|_| Study::of(&format!("{hostile}.parquet"), &trace, &options(), Some(8)).unwrap())
        .collect();
    let page = html(&studies, None, &made());
    let document = parsed(&page);
    let known = [
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "header",
        "h1",
        "nav",
        "ul",
        "li",
        "a",
        "main",
        "section",
        "h2",
        "h3",
        "dl",
        "div",
        "dt",
        "dd",
        "b",
        "span",
        "figure",
        "figcaption",
        "p",
        "svg",
        "line",
        "text",
        "path",
        "circle",
        "rect",
        "g",
        "details",
        "summary",
        "table",
        "caption",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "pre",
        "code",
    ];
    for node in document.descendants().filter(Node::is_element) {
        let name = node.tag_name().name();
        assert!(known.contains(&name), "{name}");
        for attribute in node.attributes() {
            assert!(
                !attribute.name().starts_with("on") && attribute.name() != "src",
                "{attribute:?}"
            );
            let href = attribute.name() == "href";
            assert!(!href || attribute.value().starts_with("#trace-"), "{attribute:?}");
        }
    }
    assert!(!page.contains("<script") && page.contains("&lt;script&gt;"));
    assert!(!page.contains('\u{202e}') && !page.contains('\0'));
}

#[test]
fn traces_of_any_shape_have_a_page() {
    let mut uneven = Header::uniform(3, 16, 2);
    uneven.layers[1].experts = 6;
    uneven.layers[2].used = 5;
    for (header, tokens) in [
        (Header::uniform(1, 8, 2), 1),
        (Header::uniform(1, 8, 2), 300),
        (Header::uniform(4, 4, 4), 30),
        (Header::uniform(1, 1, 1), 3),
        (Header::uniform(2, 1000, 8), 50),
        (uneven, 100),
    ] {
        let name = format!("{header:?} {tokens}");
        let page = page(&rolling(header, tokens, ""));
        parsed(&page);
        assert!(!page.contains("NaN") && !page.contains("inf"), "{name}");
        assert!(page.len() < 200_000, "{name}: {}", page.len());
    }
}

#[test]
fn many_layers_and_experts_make_no_large_page() {
    let mut trace = Trace::new(Header::uniform(4096, 300, 2)).unwrap();
    let mut state = 1u32;
    for position in 0..3 {
        let row: Vec<u16> = (0..8192)
            .map(|place| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                ((state >> 16) % 150 * 2 + place % 2) as u16
            })
            .collect();
        let token = Token {
            prompt: 0,
            position,
            batch: position,
            id: None,
            phase: Phase::Decode,
            domain: 0,
        };
        trace.push(token, &row, &[]).unwrap();
    }
    let page = page(&trace);
    let document = parsed(&page);
    assert!(page.len() < 700_000, "{}", page.len());
    assert_eq!(table(&document, "Each layer").len(), 257);
    assert!(page.contains("The first 256 of 4096 layers"));
    assert!(page.contains("A cell is the mean of 32 layers by 2 experts."));
}

#[test]
fn without_tokens_there_is_no_page() {
    let empty = Trace::new(Header::uniform(2, 8, 2)).unwrap();
    let error = Study::of("t.parquet", &empty, &options(), None).unwrap_err().to_string();
    assert!(error.contains("no tokens of the phase decode"), "{error}");
}

#[test]
fn traces_side_by_side() {
    let studies: Vec<Study> = ["olmoe.parquet", "gptoss.parquet"]
        .map(|name| Study::of(name, &public(name), &options(), None).unwrap())
        .into();
    let page = html(&studies, None, &made());
    let document = parsed(&page);
    let caption = "The metrics of eval compare: shares are from 0 to 1, distances in tokens";
    let rows = table(&document, caption);
    assert_eq!(rows[0].len(), 3);
    let reuse = rows.iter().find(|row| row[0] == "reuse_next").unwrap();
    assert_eq!(reuse[1..], ["0.435", "0.179"]);
    let lru = rows.iter().find(|row| row[0] == "hit_rate.lru.2").unwrap();
    assert_eq!(lru[1..], ["0.598", "0.331"]);
    assert_eq!(page, html(&studies, None, &made()));
}

#[test]
fn domains_are_replayed_alone() {
    let mut trace = rolling(Header::uniform(1, 8, 2), 64, "code");
    let prose = trace.domains_mut().number("prose").unwrap();
    for position in 0..64 {
        let token = Token {
            prompt: 1,
            position,
            batch: 64 + position,
            id: None,
            phase: Phase::Decode,
            domain: prose,
        };
        trace.push(token, &[6, 7], &[]).unwrap();
    }
    let page = page(&trace);
    let rows = table(&parsed(&page), "By domain");
    // One new expert with each token; and always the same two.
    assert_eq!([&rows[1][0], &rows[1][3]], ["code", "50.0 %"]);
    assert_eq!([&rows[2][0], &rows[2][3], &rows[2][5]], ["prose", "100.0 %", "98.4 %"]);
}

#[test]
fn paths_are_quoted_for_a_shell() {
    assert_eq!(
        ["a/b-1.parquet", "a b", "it's", "-x", ""].map(quoted),
        ["a/b-1.parquet", "'a b'", "'it'\\''s'", "'-x'", "''"]
    );
}

#[test]
fn what_a_plan_predicts() {
    let prediction = |placement: &str, ram: u64, tok_s: f64, fits: bool| {
        serde_json::json!({
            "placement": placement, "ram_bytes": ram, "vram_bytes": 0, "pool_bytes": ram / 2, "fits": fits,
            "hit_rate": 0.5, "tok_s": tok_s, "tok_s_low": tok_s - 1.0, "tok_s_high": tok_s + 2.0, "limited_by": "drive",
            "first_token_s": null,
        })
    };
    let predictions = [
        prediction("resident_ram", 12 << 30, 41.0, false),
        prediction("pool_ram", 4 << 30, 7.0, true),
        prediction("pool_ram", 6 << 30, 11.0, true),
    ];
    let answer = serde_json::json!({
        "model": "<b>m</b>.gguf", "sentence": "Stream <it>.", "verdict": "stream", "predictions": predictions,
    });
    let plan = Plan::from_json(&answer.to_string()).unwrap();
    let study = Study::of("t.parquet", &public("olmoe.parquet"), &options(), None).unwrap();
    let page = html(&[study], Some(&plan), &made());
    let document = parsed(&page);
    let rows = table(&document, "Predictions");
    let told =
        ["pool_ram", "4.00 GiB", "0 B", "2.00 GiB", "50.0 %", "7.0", "6.0 to 9.0", "drive", "yes"];
    assert_eq!((rows.len(), rows[2].as_slice()), (4, told.map(str::to_owned).as_slice()));
    let titles: Vec<String> = document
        .descendants()
        .filter(|node| node.has_tag_name("circle") && text(*node).contains("tokens/s"))
        .map(text)
        .collect();
    assert_eq!(titles.len(), 3);
    let no_room = "resident_ram, 12.0 GiB: 41.0 tokens/s, 40.0 to 43.0; there is no room for it";
    assert!(titles.iter().any(|title| title == no_room), "{titles:?}");
    assert!(page.contains("Stream &lt;it&gt;."));

    for (text, told) in [
        ("{}", "no answer of plan --json"),
        ("[1", "no answer"),
        (r#"{"model": "m", "sentence": "s", "predictions": []}"#, "no experts"),
    ] {
        assert!(Plan::from_json(text).unwrap_err().to_string().contains(told), "{text}");
    }
}
