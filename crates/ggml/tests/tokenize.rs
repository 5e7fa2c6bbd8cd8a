//! Texts of any shape become tokens, or an error.

mod common;

use std::fs;

use common::{Room, demo, streamed};
use tierstream_ggml::Error;

/// The demo model, whose words are split as those of another family are: by llama.cpp's general way, which
/// recurses for each character.
#[test]
fn words_of_any_length_are_no_danger() {
    let mut bytes = fs::read(demo()).unwrap();
    let key = b"tokenizer.ggml.pre\x08\0\0\0\x05\0\0\0\0\0\0\0";
    let at = bytes.windows(key.len()).position(|window| window == key).unwrap() + key.len();
    for family in [b"gpt-2", b"bloom"] {
        bytes[at..at + 5].copy_from_slice(family);
        let file = tempfile::Builder::new().suffix(".gguf").tempfile().unwrap();
        fs::write(file.path(), &bytes).unwrap();
        let model = streamed(file.path(), Room::Share(0.5));
        for letter in ["a", ".", " ", "\u{e4}", "\n", "7", "a-"] {
            for n in [1000, 60_000, 250_000] {
                let text = letter.repeat(n / letter.chars().count());
                let tokens = model.vocab().tokenize(&text, false, false).unwrap();
                let back: Vec<u8> = tokens.iter().flat_map(|&t| model.vocab().piece(t)).collect();
                assert_eq!(String::from_utf8(back).unwrap(), text);
            }
            let refused = model.vocab().tokenize(&letter.repeat(300_000), false, false);
            assert!(matches!(refused, Err(Error::Vocab(_))), "{letter:?}");
        }
        // Words of all sorts, in a text that is longer.
        let text = "an old house ".repeat(50_000);
        assert!(model.vocab().tokenize(&text, false, false).unwrap().len() > 100_000);
    }
}
