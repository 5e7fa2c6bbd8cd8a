//! Help, completions and the man page.

use crate::support::{output, stderr, stdout};

const VERBS: [&str; 15] = [
    "run",
    "serve",
    "ps",
    "stop",
    "pull",
    "list",
    "show",
    "verify",
    "bench",
    "pack",
    "trace",
    "eval",
    "doctor",
    "completions",
    "man",
];

#[test]
fn completions_know_every_verb() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let output = output(["completions", shell]);
        assert!(output.status.success(), "{output:?}");
        for verb in VERBS {
            assert!(stdout(&output).contains(verb), "{shell}: {verb}");
        }
        assert!(stdout(&output).contains("prompt-tokens"), "{shell}");
    }
}

#[test]
fn the_man_page_knows_every_verb_and_its_flags() {
    let output = output(["man"]);
    assert!(output.status.success(), "{output:?}");
    let page = stdout(&output).replace("\\-", "-");
    for verb in VERBS {
        let heading = format!(".SH \"TIERSTREAM {}\"", verb.to_uppercase());
        assert!(page.contains(&heading), "{verb}");
    }
    for flag in
        ["--prompt-tokens", "--no-measure", "--against", "--ram", "--experts-only", "--json"]
    {
        assert!(page.contains(flag), "{flag}");
    }
    let (_, environment) = page.split_once(".SH ENVIRONMENT\n").expect("a section of its own");
    let environment = environment.split(".SH ").next().unwrap();
    for variable in [
        "TIERSTREAM_BACKENDS",
        "TIERSTREAM_CACHE",
        "TIERSTREAM_MODELS",
        "OLLAMA_MODELS",
        "HF_HUB_CACHE",
        "HF_TOKEN",
        "LLAMA_CACHE",
        "NO_COLOR",
    ] {
        assert!(environment.contains(&format!(".TP\n\\fB{variable}\\fR\n")), "{environment}");
    }
    assert!(environment.lines().all(|line| line == line.trim()), "{environment}");
    assert!(!page.contains("EXTRA"));
    assert!(!page.contains("TURN"), "hidden verbs stay hidden");
}

#[test]
fn without_a_verb_there_is_help() {
    let output = output::<&str>([]);
    assert_eq!(output.status.code(), Some(2));
    for verb in VERBS {
        assert!(stderr(&output).contains(verb), "{verb}");
    }
}
