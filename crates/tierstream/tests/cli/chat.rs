//! The chat, on a terminal.

use std::fs;

use rustix::process::Signal;

use crate::support::{Terminal, demo, demo_with, json, signal, tierstream};

const CHATML: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n\
                      {% endfor %}{{ '<|im_start|>assistant\\n' }}";

#[test]
fn a_conversation() {
    let cache = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let mut chat =
        Terminal::new(cache.path(), ["run", "demo", "-n", "12", "--seed", "1", "--experts", "50%"]);
    let greeting = chat.wait_for(">>> ");
    assert!(greeting.contains("note: this model has no chat template"), "{greeting}");
    assert!(chat.ask("Once upon a time").contains("12 tokens, "));
    assert!(chat.ask("/set n 3").contains("n is 3"));
    assert!(chat.ask("there was").contains("3 tokens, "));
    assert!(chat.ask("/set n 0").contains("n is a whole number from 1 on"));
    assert!(chat.ask("/set temp x").contains("a temperature is a number from 0 on"));
    assert!(chat.ask("/set temp 0").contains("temp is 0"));
    assert!(chat.ask("/set temperature -1").contains("a temperature is a number from 0 on"));
    assert!(chat.ask("/set parameter temperature 0").contains("temperature is 0"));
    assert!(chat.ask("/set system Be brief.").contains("this model has no chat template"));
    assert!(chat.ask("/show info").contains("/show takes no argument"));
    let stats = chat.ask("/stats");
    for part in ["answers:       2\n", "\ntokens:        15\n", "tokens/s\nhit rate:", "io path:"] {
        assert!(stats.contains(part), "{part}: {stats}");
    }
    assert!(chat.ask("/show").contains("architecture:    qwen3moe"));
    assert!(chat.ask("/help").contains("/bye"));
    assert!(chat.ask("/tmp/x.png what is this").contains(" tokens, "));
    assert!(chat.ask("/clear").contains("the conversation is forgotten"));
    assert!(chat.ask("/stats").contains("context:       0 of 1024 tokens"));
    // Ctrl-C at the prompt, then Ctrl-D.
    chat.send("half a line\x03");
    chat.wait_for("/bye or Ctrl-D leaves");
    chat.wait_for("\n>>> ");
    chat.send("\x04");
    assert_eq!(chat.exit().code(), Some(0));
    let history = fs::read_to_string(cache.path().join("history")).unwrap();
    assert!(history.contains("Once upon a time"), "{history}");
}

#[test]
fn texts_of_several_lines() {
    let cache = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let mut chat = Terminal::new(cache.path(), ["run", "demo", "-n", "2", "--verbose", "-t", "1"]);
    chat.wait_for(">>> ");
    let one = prompt_tokens(&chat.ask("a"));
    chat.send("\"\"\"a\r");
    chat.send("/bye\r");
    chat.send("b\"\"\"\r");
    let quoted = prompt_tokens(&chat.wait_for("tok/s"));
    chat.wait_for("\n>>> ");
    chat.send("fn main() {\\\r");
    chat.send("}\r");
    let escaped = prompt_tokens(&chat.wait_for("tok/s"));
    assert!(one <= 2 && quoted > one + 2 && escaped > one + 2, "{one} {quoted} {escaped}");
    chat.wait_for("\n>>> ");
    chat.send("/bye\r");
    assert_eq!(chat.exit().code(), Some(0));
}

#[test]
fn lines_typed_during_an_answer_are_kept() {
    let cache = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let args = ["run", "demo", "-n", "200", "--temp", "0", "-t", "1"];
    let mut chat = Terminal::new(cache.path(), args);
    chat.wait_for(">>> ");
    chat.send("It was\r");
    chat.wait_for("\n");
    // So much is generated text.
    chat.wait_until(|shown| (shown.len() > 40).then_some(40));
    chat.send("/set n 5\r/stats\r\"\"\"Second\r/bye\"\"\"\r/set n");
    chat.wait_for(">>> /set n 5\nn is 5\n");
    assert!(chat.wait_for("\nprompt tokens:").contains(">>> /stats\nThe chat so far:\nanswers:"));
    chat.wait_for(">>> \"\"\"Second\n/bye\"\"\"\n");
    chat.wait_for("5 tokens, ");
    // What is not sent yet can be edited.
    chat.wait_for("\n>>> /set n");
    chat.send(" 3\r");
    chat.wait_for("n is 3");
    chat.wait_for("\n>>> ");
    chat.send("\x04");
    assert_eq!(chat.exit().code(), Some(0));
}

/// Of the timings of `--verbose`.
fn prompt_tokens(shown: &str) -> usize {
    let count = shown.split("prompt eval count:").nth(1).expect(shown);
    count.split_whitespace().next().unwrap().parse().unwrap()
}

#[test]
fn answers_have_seeds_of_their_own_until_one_is_set() {
    let cache = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let mut chat = Terminal::new(cache.path(), ["run", "demo", "-n", "2", "--verbose", "-t", "1"]);
    chat.wait_for(">>> ");
    let mut seed = || {
        let shown = chat.ask("It was");
        let seed = shown.split("\nseed:").nth(1).expect("the timings tell it");
        let seed = seed.split_whitespace().next().unwrap().to_owned();
        chat.ask("/set seed 7");
        seed
    };
    let (first, then) = (seed(), seed());
    assert_ne!(first, "7");
    assert_eq!([then, seed()], ["7", "7"]);
    chat.send("\x04");
    assert_eq!(chat.exit().code(), Some(0));
}

#[test]
fn a_stop_text_ends_an_answer_and_not_the_chat() {
    let cache = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let args = ["run", "demo", "-n", "1000", "--temp", "0", "-t", "1", "--stop", "e"];
    let mut chat = Terminal::new(cache.path(), args);
    chat.wait_for(">>> ");
    for _ in 0..2 {
        let shown = chat.ask("It was");
        let (answer, summary) = shown.split_once('\n').expect(&shown);
        assert!(!answer.contains('e') && summary.contains(" token"), "{shown}");
        assert!(!shown.contains("stopped"), "{shown}");
    }
    chat.send("\x04");
    assert_eq!(chat.exit().code(), Some(0));
}

#[test]
fn a_full_context_is_said_and_the_oldest_turns_are_forgotten() {
    let cache = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let mut chat = Terminal::new(
        cache.path(),
        ["run", "demo", "-n", "1000", "--ctx", "64", "--temp", "0", "-t", "1"],
    );
    chat.wait_for(">>> ");
    let full = chat.ask("It was a cold evening");
    assert!(full.contains(", the context is full"), "{full}");
    assert!(full.contains("the next message makes room"), "{full}");
    let note = "note: the context of 64 tokens is full: the oldest turn is forgotten\n";
    let answered = chat.ask("It was a cold evening");
    assert!(answered.contains(note) && answered.contains("tok/s"), "{answered}");
    // It is the same conversation as if it had begun there.
    let text = |shown: &str| shown.lines().find(|l| !l.starts_with("note: ")).map(str::to_owned);
    assert_eq!(text(&answered), text(&full));
    let refused = chat.ask(&"word ".repeat(70));
    assert!(refused.contains("the context of 64 tokens has no room for that; --ctx"), "{refused}");
    chat.ask("/clear");
    let answered = chat.ask("It was a cold evening");
    assert!(answered.contains("tok/s") && !answered.contains("note"), "{answered}");
    chat.send("\x04");
    assert_eq!(chat.exit().code(), Some(0));
}

#[test]
fn the_system_prompt_outlives_the_oldest_turns() {
    let cache = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let model = demo_with(cache.path(), "tokenizer.chat_template", CHATML);
    let model = model.to_str().unwrap();
    let answers = |system: &[&str]| {
        let args = ["run", model, "--ctx", "200", "--temp", "0", "-n", "1000", "-t", "1"];
        let mut chat = Terminal::new(cache.path(), [&args[..], system].concat());
        chat.wait_for(">>> ");
        let first = chat.ask("Hello");
        assert!(first.contains("the context is full"), "{first}");
        let (note, then) = {
            let shown = chat.ask("Hello");
            let (note, then) = shown.split_once('\n').expect(&shown);
            (note.to_owned(), then.to_owned())
        };
        assert_eq!(note, "note: the context of 200 tokens is full: the oldest turn is forgotten");
        chat.send("\x04");
        assert_eq!(chat.exit().code(), Some(0));
        [first, then].map(|shown| shown.split(" tokens, ").next().unwrap().to_owned())
    };
    let [first, then] = answers(&["--system", "Be brief."]);
    assert_eq!(first, then);
    assert_ne!(first, answers(&[])[0]);
}

#[test]
fn a_message_without_room_leaves_the_conversation_as_it_was() {
    let count = |refused: bool| {
        let cache = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let args = ["run", "demo", "-n", "3", "--ctx", "64", "--temp", "0", "--verbose", "-t", "1"];
        let mut chat = Terminal::new(cache.path(), args);
        chat.wait_for(">>> ");
        chat.ask("It was");
        if refused {
            let told = chat.ask(&"word ".repeat(70));
            assert!(told.contains("has no room for that"), "{told}");
        }
        let tokens = prompt_tokens(&chat.ask("and"));
        chat.send("\x04");
        assert_eq!(chat.exit().code(), Some(0));
        tokens
    };
    assert_eq!(count(true), count(false));
}

#[test]
fn signals() {
    let cache = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let args = ["run", "demo", "-n", "1000000", "--ctx", "200000", "--temp", "0", "-t", "1"];
    let mut chat = Terminal::new(cache.path(), args);
    chat.wait_for(">>> ");
    chat.send("It was\r");
    chat.wait_for("\n");
    // So much is generated text.
    chat.wait_until(|shown| (shown.len() > 400).then_some(400));
    signal(&chat.child, Signal::INT);
    chat.wait_for(", stopped");
    chat.wait_for("\n>>> ");
    // The chat goes on after that.
    assert!(chat.ask("/set n 3").contains("n is 3"));
    assert!(chat.ask("and then").contains("3 tokens, "));
    // At the prompt nothing is there to stop but the program.
    signal(&chat.child, Signal::TERM);
    assert_eq!(chat.exit().code(), Some(143));
}

#[test]
fn a_signal_that_means_the_program_ends_the_chat_during_an_answer() {
    for (asked, code) in [(Signal::TERM, 143), (Signal::HUP, 129)] {
        let cache = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let args = ["run", "demo", "-n", "1000000", "--ctx", "200000", "--temp", "0", "-t", "1"];
        let mut chat = Terminal::new(cache.path(), args);
        chat.wait_for(">>> ");
        chat.send("It was\r");
        chat.wait_for("\n");
        // So much is generated text.
        chat.wait_until(|shown| (shown.len() > 400).then_some(400));
        signal(&chat.child, asked);
        chat.wait_for(", stopped");
        assert_eq!(chat.exit().code(), Some(code));
    }
}

#[test]
fn a_template_sees_the_whole_conversation_and_nothing_is_read_twice() {
    let cache = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let model = demo_with(cache.path(), "tokenizer.chat_template", CHATML);
    let args = ["run", model.to_str().unwrap(), "-n", "20", "--temp", "0", "--verbose", "-t", "1"];
    let mut chat = Terminal::new(cache.path(), args);
    let greeting = chat.wait_for(">>> ");
    assert!(!greeting.contains("no chat template"), "{greeting}");
    let first = prompt_tokens(&chat.ask("Hello"));
    let second = prompt_tokens(&chat.ask("Hello"));
    // The end of the answer comes on top, and its last token.
    assert!((first..first + 20).contains(&second), "{first} {second}");
    let held = format!("context:       {} of", first + second + 2 * 20 - 2);
    let stats = chat.ask("/stats");
    assert!(stats.contains(&held), "{held}: {stats}");
    chat.send("/bye\r");
    assert_eq!(chat.exit().code(), Some(0));
}

#[test]
fn thinking_is_shown_until_it_is_set_off() {
    let cache = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let template = "{% for m in messages %}{{ m.content }}\n{% endfor %}\
                    {% if enable_thinking %}<think>{% endif %}";
    let model = demo_with(cache.path(), "tokenizer.chat_template", template);
    let args = ["run", model.to_str().unwrap(), "-n", "8", "--temp", "0", "-t", "1"];
    let mut chat = Terminal::new(cache.path(), args);
    chat.wait_for(">>> ");
    assert!(chat.ask("It was").starts_with("Thinking...\n"));
    assert!(chat.ask("/set think much").contains("there are true, false, low"));
    assert!(chat.ask("/set nothink").contains("think is false"));
    let shown = chat.ask("It was");
    assert!(!shown.contains("Thinking...") && shown.contains("8 tokens, "), "{shown}");
    chat.send("\x04");
    assert_eq!(chat.exit().code(), Some(0));
}

#[test]
fn a_system_prompt_comes_first_and_can_be_changed() {
    let cache = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let model = demo_with(cache.path(), "tokenizer.chat_template", CHATML);
    let model = model.to_str().unwrap();
    let usual = ["-n", "3", "--temp", "0", "--verbose", "-t", "1"];
    let count = |args: &[&str], lines: &[&str]| {
        let args = [&["run", model][..], &usual, args].concat();
        let mut chat = Terminal::new(cache.path(), args);
        chat.wait_for(">>> ");
        for line in lines {
            chat.ask(line);
        }
        let tokens = prompt_tokens(&chat.ask("Hello"));
        chat.send("/bye\r");
        assert_eq!(chat.exit().code(), Some(0));
        tokens
    };
    let brief = count(&["--system", "Be brief."], &[]);
    assert!(brief > count(&[], &[]));
    assert_eq!(count(&[], &["/set system Be brief."]), brief);
    // It stays when the messages are forgotten.
    assert_eq!(count(&["--system", "Be brief."], &["Hi", "/clear"]), brief);
    // One that is changed is read at the beginning of the conversation.
    let changed = count(&["--system", "You are a poet."], &["Hi", "/set system Be brief."]);
    assert!(changed > brief, "{changed} {brief}");
    let single = json(&["run", model, "Hello", "--system", "Be brief.", "-n", "3", "-t", "1"]);
    assert_eq!(single["prompt_tokens"], brief);
}

#[test]
fn lines_are_broken_at_words() {
    let cache = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let args = ["run", "demo", "-n", "60", "--temp", "0", "-t", "1"];
    let whole = json(&[&args[..], &["It was"]].concat());
    let mut chat = Terminal::of_columns(40, cache.path(), args);
    chat.wait_for(">>> ");
    let shown = chat.ask("It was");
    let (text, status) = shown.split_once("60 tokens, ").expect(&shown);
    assert!(status.lines().count() > 1 && status.lines().all(|l| l.len() <= 40), "{status}");
    // Words of the text end all lines; what was taken back of the next one may follow.
    let words: Vec<&str> = whole["text"].as_str().unwrap().split_whitespace().collect();
    let lines: Vec<&str> = text.lines().collect();
    assert!(lines.len() > 5 && lines.iter().all(|l| l.len() < 40), "{text}");
    for line in lines.iter().filter_map(|l| l.split_whitespace().next()) {
        assert!(words.contains(&line), "{line}: {text}");
    }
    chat.send("\x04");
    assert_eq!(chat.exit().code(), Some(0));
}

#[test]
fn there_is_no_chat_without_a_terminal() {
    let cache = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let mut chat = Terminal::new(cache.path(), ["run", demo().to_str().unwrap(), "--json"]);
    chat.wait_for("\"error\": \"there is no prompt\"");
    assert_eq!(chat.exit().code(), Some(1));
    let output = tierstream().arg("run").arg(demo()).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
}
