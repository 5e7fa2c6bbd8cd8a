//! Templates of Ollama's.

use serde_json::json;
use tierstream_chat::{DateTime, Error, Message, Request, Template, Think, Tool};

use crate::chats::{NOW, rendered};
use crate::common::{source, tool};

fn family(name: &str) -> Template {
    Template::go(&source(&format!("{name}.gotmpl"))).expect("it is well-formed")
}

fn text(source: &str, messages: &[Message], tools: &[Tool]) -> Result<String, Error> {
    let request = Request { tools, ..Request::new(messages, DateTime::from_unix(NOW)) };
    Template::go(source)?.render(&request)
}

/// What an expression gives for a chat of one message, which the template takes as such.
fn of(source: &str) -> String {
    let source = format!("{{{{ if .Messages }}}}{{{{ end }}}}{source}");
    match text(&source, &[Message::new("user", "hé")], &[]) {
        Ok(text) => text,
        Err(error) => format!("error: {error}"),
    }
}

#[test]
fn prompts_of_all_families() {
    for name in ["fim", "gemma", "gpt-oss", "llama3", "mistral", "qwen3"] {
        insta::with_settings!({omit_expression => true}, {
            insta::assert_snapshot!(format!("go_{name}"), rendered(&family(name)));
        });
    }
}

#[test]
fn text_goes_between_two_others_where_there_is_a_place() {
    let now = DateTime::from_unix(NOW);
    let fim = family("fim");
    let prompt = fim.insert("def f(", "\n  return 1", None, now).expect("it has a place");
    assert_eq!(prompt, "<|fim_prefix|>def f(<|fim_suffix|>\n  return 1<|fim_middle|>");
    assert!(matches!(family("gemma").insert("a", "b", None, now), Err(Error::NoInsert)));
}

#[test]
fn turns_are_written_one_by_one() {
    let template = "{{ if .System }}[{{ .System }}]{{ end }}{{ if .Prompt }}<{{ .Prompt }}>{{ end }}{{ .Response }};";
    let chat = |roles: &[(&str, &str)]| {
        let messages: Vec<_> =
            roles.iter().map(|(role, text)| Message::new(*role, *text)).collect();
        text(template, &messages, &[]).expect("it takes these")
    };
    assert_eq!(chat(&[("user", "a")]), "<a>");
    assert_eq!(
        chat(&[("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c")]),
        "[s]<a>b;<c>"
    );
    assert_eq!(chat(&[("user", "a"), ("user", "b")]), "<a\n\nb>");
    assert_eq!(chat(&[("user", "a"), ("system", "s"), ("user", "b")]), "<a>;[s]<b>");
    assert_eq!(chat(&[("user", "a"), ("assistant", "b")]), "<a>b");
    // A template that never says where the response goes gets it at its end.
    let without = text("{{ .Prompt }}:", &[Message::new("user", "a")], &[]);
    assert_eq!(without.expect("it takes this"), "a:");
}

#[test]
fn functions() {
    let cases = [
        ("{{ and 1 0 }}{{ and 1 2 }}{{ or 0 \"\" }}{{ or 0 3 }}", "023"),
        ("{{ not 0 }}{{ not \"a\" }}", "truefalse"),
        (
            "{{ eq 1 1 }}{{ eq \"a\" \"b\" \"a\" }}{{ ne 1 2 }}{{ lt 1 2 }}{{ le 2 2 }}{{ gt 1 2 }}{{ ge 1 2 }}",
            "truetruetruetruetruefalsefalse",
        ),
        ("{{ len \"hé\" }}{{ len .Messages }}{{ len .Tools }}", "310"),
        (
            "{{ (index .Messages 0).Role }}{{ with index .Messages 0 }}{{ .Content }}{{ end }}",
            "userhé",
        ),
        ("{{ slice \"abcdef\" 1 3 }}{{ slice \"abc\" 2 }}{{ len (slice .Messages 1) }}", "bcc0"),
        ("{{ index .Messages 1 }}", "error: the chat template failed: index: out of range"),
        ("{{ slice \"abc\" 4 }}", "error: the chat template failed: slice: out of range"),
        (
            "{{ print 1 \"a\" }}|{{ println 1 }}|{{ printf \"%s=%d %q %v%%\" \"a\" 1 \"b\\\"\" true }}",
            "1a|1\n|a=1 \"b\\\"\" true%",
        ),
        ("{{ \"a\" | printf \"%s-%s\" \"b\" }}", "b-a"),
        (
            "{{ json \"<é>\" }}{{ json 1.0 }}{{ .Messages | json | len | gt 10 }}",
            "\"\\u003cé\\u003e\"1false",
        ),
        ("{{ currentDate }} {{ yesterdayDate }}", "2026-11-27 2026-11-26"),
        (
            "{{ 'a' }}{{ `raw\\n` }}{{ \"t\\tu\\u00e9\" }}{{ 0x1f }}{{ 1_000 }}{{ -3 }}{{ 1.5 }}",
            "97raw\\nt\tué311000-31.5",
        ),
        ("{{ true }}{{ false }}{{ .System }}|{{ .Nothing }}|{{ $.Nothing }}", "truefalse||"),
        ("{{ eq .Nothing \"\" }}{{ if .Nothing }}a{{ else }}b{{ end }}", "trueb"),
    ];
    for (source, expected) in cases {
        assert_eq!(of(source), expected, "{source}");
    }
}

#[test]
fn blocks_variables_and_white_space() {
    let cases = [
        ("a {{- 1 -}} b {{ 2 }} c {{- \"\" }}", "a1b 2 c"),
        ("{{/* note */}}a{{- /* note */ -}} b", "ab"),
        ("{{ $x := 1 }}{{ if true }}{{ $x = 2 }}{{ $y := 3 }}{{ $y }}{{ end }}{{ $x }}", "32"),
        ("{{ $x := 1 }}{{ if true }}{{ $x := 2 }}{{ end }}{{ $x }}", "1"),
        ("{{ $y }}", "error: the chat template failed: there is no variable $y"),
        ("{{ range $i, $m := .Messages }}{{ $i }}{{ $m.Role }}{{ .Role }}{{ end }}", "0useruser"),
        (
            "{{ range $m := .Messages }}{{ $m.Content }}{{ end }}{{ range .Tools }}{{ else }}none{{ end }}",
            "hénone",
        ),
        ("{{ range 3 }}{{ . }}{{ if eq . 1 }}{{ break }}{{ end }}{{ end }}", "01"),
        ("{{ range 3 }}{{ if eq . 1 }}{{ continue }}{{ end }}{{ . }}{{ end }}", "02"),
        ("{{ if false }}a{{ else if true }}b{{ else }}c{{ end }}", "b"),
        ("{{ with .System }}a{{ else with .Messages }}{{ len . }}{{ else }}c{{ end }}", "1"),
        ("{{ with $x := 5 }}{{ $x }}{{ . }}{{ end }}", "55"),
        ("{{ (1) }}{{ (len (print 1 2)) }}", "12"),
    ];
    for (source, expected) in cases {
        assert_eq!(of(source), expected, "{source}");
    }
}

#[test]
fn what_is_malformed_is_told_with_its_line() {
    let cases = [
        ("a\n{{ if }}", 2, "a command is missing"),
        ("{{ if true }}", 1, "if has no end"),
        ("{{ end }}", 1, "an end is outside of a block"),
        ("{{ else }}", 1, "an else is outside of a block"),
        ("\n\n{{ nothing 1 }}", 3, "there is no function nothing"),
        ("{{ \"a", 1, "a string has no end"),
        ("{{ (1 }}", 1, "a parenthesis is not closed"),
        ("{{ 1) }}", 1, "a parenthesis is too much"),
        ("{{ 1 2 }}", 1, "arguments are given to what is no function"),
        ("{{ /* a }}", 1, "a comment has no end"),
        ("{{ .A", 1, "an action has no end"),
        ("{{ }}", 1, "an action is empty"),
        ("{{ define \"a\" }}{{ end }}", 1, "define is not supported"),
        ("{{ ? }}", 1, "'?' is unexpected"),
    ];
    for (source, expected_line, expected) in cases {
        match Template::go(source) {
            Err(Error::Syntax { line, reason }) => {
                assert_eq!((line, reason.as_str()), (expected_line, expected), "{source}");
            }
            other => panic!("{source}: {other:?}"),
        }
    }
}

#[test]
fn tools_have_the_fields_and_the_json_of_ollama() {
    let weather = tool(
        "f",
        "<d>",
        json!({
            "properties": {"b": {"description": "x", "type": "string"}, "a": {"type": ["integer", "null"]}},
            "required": ["b"],
            "type": "object",
        }),
    );
    let source = "{{ range .Messages }}{{ end }}{{ range .Tools }}{{ .Function.Name }} {{ .Type }} {{ .Function.Parameters.Required }}\n\
                  {{ . }}\n{{ range $k, $v := .Function.Parameters.Properties }}{{ $k }}:{{ toTypeScriptType $v }} {{ end }}{{ end }}{{ json .Tools }}";
    let tools = [weather];
    let given = text(source, &[Message::new("user", "a")], &tools).expect("it takes these");
    let json = "{\"type\":\"function\",\"function\":{\"name\":\"f\",\"description\":\"\\u003cd\\u003e\",\"parameters\":\
                {\"type\":\"object\",\"required\":[\"b\"],\"properties\":{\"a\":{\"type\":[\"integer\",\"null\"]},\
                \"b\":{\"type\":\"string\",\"description\":\"x\"}}}}}";
    assert_eq!(given, format!("f function [b]\n{json}\na:number | null b:string [{json}]"));
}

#[test]
fn thinking_is_told_to_the_template() {
    let source = "{{ range .Messages }}{{ .Thinking }}{{ end }}{{ .IsThinkSet }} {{ .Think }} {{ .ThinkLevel }}";
    let template = Template::go(source).expect("it is well-formed");
    assert!(template.capabilities().thinking);
    let told = |think| {
        let messages = [Message { thinking: Some("Hm.".into()), ..Message::new("assistant", "") }];
        let request = Request { think, ..Request::new(&messages, DateTime::from_unix(NOW)) };
        template.render(&request).expect("it takes this")
    };
    assert_eq!(told(None), "Hm.false false ");
    assert_eq!(told(Some(Think::Off)), "Hm.true false ");
    assert_eq!(told(Some(Think::On)), "Hm.true true ");
    assert_eq!(told(Some(Think::High)), "Hm.true true high");
}
