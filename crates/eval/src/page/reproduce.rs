//! How to get the numbers again, and what they mean.

use std::fmt::Write as _;

use super::Made;
use super::study::Study;
use super::text::escape;
use crate::sim::PoolKind;

/// Words that the page uses.
const WORDS: [(&str, &str); 12] = [
    ("hit", "A routed expert that is resident when its layer needs it. A first use is a miss."),
    (
        "ρ (rho)",
        "Size of a pool in experts of a token: slots of a layer over the experts that a token uses there.",
    ),
    (
        "step",
        "A layer of one token. Its experts are looked up at once, and none of them goes before it is over.",
    ),
    (
        "Belady",
        "The optimum: who is needed again last goes. It knows the future, and no policy does better.",
    ),
    (
        "shuffled",
        "The tokens of each prompt in any order, all layers of a token together. What is left is popularity.",
    ),
    ("uniform", "Any k of the E experts. A pool hits as often as an expert is resident."),
    ("reuse", "Mean share of a token’s experts that the token before used in the same layer."),
    ("distance", "Tokens since the last use of an expert in its layer; 1 is by the token before."),
    (
        "SRP",
        "Segment routing best performance (arXiv 2505.16056): F1 of the best fixed group of experts for some tokens in a row.",
    ),
    (
        "SCH",
        "Segment cache best hit rate (the same): a cache of ρ that knows the next so many tokens.",
    ),
    ("hot set", "The most used experts of one half of the trace, tried on the other half."),
    (
        "entropy, Gini",
        "How evenly a layer’s experts are used: entropy as a share of the most, Gini from 0 (evenly) to 1.",
    ),
];

/// Commands that give the numbers again, and what they mean.
pub(super) fn section(studies: &[Study], made: &Made) -> String {
    let mut commands = vec![made.command.clone()];
    for study in studies {
        let mut flags =
            format!("--phase {} --seed {}", study.options.phase.name(), study.options.seed);
        if let Some(experts) = study.experts {
            _ = write!(flags, " --experts {experts}");
        }
        let path = quoted(&study.trace);
        commands.push(format!("tierstream eval metrics {path} {flags} --json"));
        // Curves with the same sizes in one command.
        let mut groups: Vec<(PoolKind, Vec<String>, Vec<String>)> = Vec::new();
        for curve in &study.report.curves {
            let pool = curve.setup.pool;
            let points = curve.points.iter();
            let slots: Vec<String> = points.map(|p| p.slots_per_layer.to_string()).collect();
            let policy = curve.setup.eviction.to_string();
            match groups.iter_mut().find(|group| group.0 == pool && group.2 == slots) {
                Some((_, policies, _)) => policies.push(policy),
                None => groups.push((pool, vec![policy], slots)),
            }
        }
        for (pool, policies, slots) in groups {
            commands.push(format!(
                "tierstream eval simulate {path} {flags} --policy {} --pool {pool} --slots {} --json",
                policies.join(","),
                slots.join(",")
            ));
        }
    }
    let lines: String = commands.iter().map(|line| escape_long(line) + "\n").collect();
    let words = WORDS.iter().map(|(word, meaning)| format!("<dt>{word}</dt><dd>{meaning}</dd>"));
    format!(
        "<section id=\"reproduce\">\n<h2>How to get these numbers</h2>\n\
         <p class=\"note\">tierstream {}. Equal traces and seeds give equal numbers.</p>\n<pre>{lines}</pre>\n\
         <h3>Words</h3>\n<dl class=\"words\">{}</dl>\n\
         <p class=\"note\">Formulas, and how they compare with published numbers: docs/evaluation.md of tierstream.</p>\n</section>\n",
        escape(&made.version),
        words.collect::<String>()
    )
}

/// Of a command, all of it.
fn escape_long(text: &str) -> String {
    let characters: Vec<char> = text.chars().collect();
    characters.chunks(200).map(|part| escape(&part.iter().collect::<String>())).collect()
}

/// A path as a shell takes it.
#[must_use]
pub fn quoted(path: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+=:,@%".contains(c);
    match !path.is_empty() && !path.starts_with('-') && path.chars().all(plain) {
        true => path.to_owned(),
        false => format!("'{}'", path.replace('\'', "'\\''")),
    }
}
