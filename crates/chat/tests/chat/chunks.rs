//! How a reply is cut into pieces makes no difference.

use proptest::prelude::*;
use tierstream_chat::Format;

use crate::common::{format, parse, source, tools};
use crate::parser::{FAMILIES, Family};

/// The pieces between these places, moved to where letters begin.
fn cut<'t>(text: &'t str, places: &[usize]) -> Vec<&'t str> {
    let mut places: Vec<usize> =
        places.iter().map(|&at| text.floor_char_boundary(at.min(text.len()))).collect();
    places.extend([0, text.len()]);
    places.sort_unstable();
    places.windows(2).map(|pair| &text[pair[0]..pair[1]]).collect()
}

fn check(format: &Format, opens_thinking: bool, text: &str, pieces: &[&str]) {
    let whole = parse(format, &tools(), opens_thinking, [text]);
    let cut = parse(format, &tools(), opens_thinking, pieces.iter().copied());
    assert_eq!(whole, cut, "{text:?} as {pieces:?}");
}

#[test]
fn every_split_in_two_and_letter_by_letter() {
    for Family { template, opens_thinking, replies } in FAMILIES {
        let format = format(template);
        for reply in *replies {
            for at in 0..reply.len() {
                check(&format, *opens_thinking, reply, &cut(reply, &[at]));
            }
            let letters: Vec<usize> = (0..reply.len()).collect();
            check(&format, *opens_thinking, reply, &cut(reply, &letters));
        }
    }
}

#[test]
fn every_beginning_of_a_reply() {
    for Family { template, opens_thinking, replies } in FAMILIES {
        let format = format(template);
        for reply in *replies {
            for (at, _) in reply.char_indices() {
                let letters: Vec<usize> = (0..at).collect();
                check(&format, *opens_thinking, &reply[..at], &cut(&reply[..at], &letters));
            }
        }
    }
}

/// Words that formats are made of, in any order, and long ones that limits are about.
fn word() -> impl Strategy<Value = String> {
    let marks: Vec<String> = FAMILIES
        .iter()
        .flat_map(|family| Format::detect(&source(family.template)).marks())
        .map(str::to_owned)
        .collect();
    let json = [
        "{",
        "}",
        "[",
        "]",
        ",",
        ":",
        "\"",
        "\\",
        "{}",
        "\"name\"",
        "\"arguments\"",
        "\"now\"",
        "\"parameters\": {",
        "{\"name\": \"now\", \"arguments\": {",
        "null",
        "1.5",
        "é",
        " ",
        "\n",
        "now",
        "<function=",
        "<parameter=",
        "</parameter>",
        "</function>",
        " to=functions.now",
        "analysis",
        "json",
        "<invoke name=\"now\">",
        "a",
        "</invoke>",
        ";",
    ];
    prop_oneof![
        4 => prop::sample::select(marks),
        6 => prop::sample::select(json.to_vec()).prop_map(str::to_owned),
        1 => "[a-zé<>｜ \n]{1,6}",
        1 => (prop::sample::select(vec!["a", " ", "\n", "é", "1"]), 60_usize..1100)
            .prop_map(|(text, n)| text.repeat(n)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn any_words_in_any_pieces(
        family in 0..FAMILIES.len(),
        opens_thinking: bool,
        words in prop::collection::vec(word(), 0..14),
        places in prop::collection::vec(0_usize..3000, 0..12),
    ) {
        let text = words.concat();
        let format = format(FAMILIES[family].template);
        check(&format, opens_thinking, &text, &cut(&text, &places));
        let letters: Vec<usize> = (0..text.len()).collect();
        check(&format, opens_thinking, &text, &cut(&text, &letters));
    }

    #[test]
    fn a_reply_with_something_missing_or_added(
        (family, reply) in (0..FAMILIES.len())
            .prop_flat_map(|f| (Just(f), 0..FAMILIES[f].replies.len())),
        from in 0_usize..400,
        length in 0_usize..20,
        added in word(),
        places in prop::collection::vec(0_usize..600, 0..12),
    ) {
        let family = &FAMILIES[family];
        let reply = family.replies[reply];
        let from = reply.floor_char_boundary(from.min(reply.len()));
        let to = reply.floor_char_boundary((from + length).min(reply.len()));
        let text = format!("{}{added}{}", &reply[..from], &reply[to..]);
        check(&format(family.template), family.opens_thinking, &text, &cut(&text, &places));
    }
}
