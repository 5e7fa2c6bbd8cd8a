//! Jinja templates in the style of model families. `scripts/oracle_chat.py` compares the same ones with
//! jinja2.

use serde_json::json;
use tierstream_chat::{DateTime, Error, Message, Request, Template, Think, Tool};

use crate::chats::{NOW, call, calling, plain, rendered};
use crate::common::{source, tools};

const FAMILIES: [&str; 17] = [
    "command-r7b",
    "deepseek-r1",
    "deepseek-v3.1",
    "gemma2",
    "gemma3",
    "glm4.5",
    "gpt-oss",
    "granite3",
    "kimi-k2",
    "llama3",
    "minimax-m2",
    "mistral-tekken",
    "mistral-v3",
    "phi4",
    "qwen3",
    "qwen3-coder",
    "seed-oss",
];

fn family(name: &str) -> Template {
    Template::jinja(&source(&format!("{name}.jinja")), "<s>", "</s>").expect("it is well-formed")
}

fn template(source: &str) -> Template {
    Template::jinja(source, "<s>", "</s>").expect("it is well-formed")
}

fn text(template: &Template, messages: &[Message], tools: &[Tool]) -> String {
    let request = Request { tools, ..Request::new(messages, DateTime::from_unix(NOW)) };
    template.render(&request).expect("it takes these messages")
}

#[test]
fn prompts_of_all_families() {
    for name in FAMILIES {
        insta::with_settings!({omit_expression => true}, {
            insta::assert_snapshot!(format!("jinja_{name}"), rendered(&family(name)));
        });
    }
}

#[test]
fn prompts_that_end_in_thinking_say_so() {
    for name in FAMILIES {
        let template = family(name);
        let messages = [Message::new("user", "a")];
        let opens = |think| {
            let request = Request { think, ..Request::new(&messages, DateTime::from_unix(NOW)) };
            let prompt = template.render(&request).expect("it takes this message");
            template.format().opens_thinking(&prompt)
        };
        let expected = match name {
            "deepseek-r1" | "minimax-m2" => (true, true, true),
            "deepseek-v3.1" => (false, true, false),
            _ => (false, false, false),
        };
        assert_eq!(
            (opens(None), opens(Some(Think::On)), opens(Some(Think::Off))),
            expected,
            "{name}"
        );
    }
}

#[test]
fn a_role_that_a_template_refuses_goes_to_the_user() {
    let gemma = family("gemma2");
    let prompt = text(&gemma, &plain(), &[]);
    assert!(prompt.contains("<start_of_turn>user\nBe short.\n\nHi 😀<end_of_turn>"), "{prompt}");
    let developer = [Message::new("developer", "Be short."), Message::new("user", "Hi")];
    let prompt = text(&family("qwen3"), &developer, &[]);
    assert!(prompt.starts_with("<|im_start|>system\nBe short.<|im_end|>"), "{prompt}");
    let prompt = text(&family("gpt-oss"), &developer, &[]);
    assert!(prompt.contains("# Instructions\n\nBe short."), "{prompt}");
    // Nothing but a system message is said by the user.
    let prompt = text(&gemma, &developer[..1], &[]);
    assert!(prompt.contains("<start_of_turn>user\nBe short.<end_of_turn>"), "{prompt}");
}

#[test]
fn arguments_are_handed_over_as_the_template_takes_them() {
    let messages = calling();
    let json = "{\"days\": 2, \"city\": \"Köln\"}";
    for name in ["deepseek-r1", "qwen3", "kimi-k2", "mistral-tekken", "gpt-oss", "granite3"] {
        let prompt = text(&family(name), &messages, &tools()[..2]);
        assert!(prompt.contains(json), "{name}: {prompt}");
        assert!(!prompt.contains("\\\"days"), "{name}: {prompt}");
    }
    // One that takes either, and one that wants no content beside a call.
    let strict = "{% for m in messages %}{% if m.tool_calls and m.content is none %}\
                  {{ m.tool_calls[0].function.name ~ m.tool_calls[0].function.arguments }}{% else %}{{ m.content }}{% endif %}\
                  {% endfor %}";
    assert_eq!(
        text(&template(strict), &messages, &[]),
        format!("Weather?get_weather{json}{{\"degrees\": 3.0}}")
    );
}

#[test]
fn thinking_of_turns_before_is_the_templates_to_show() {
    let thought = Message { thinking: Some("Hm.".into()), ..Message::new("assistant", "Yes.") };
    let messages = [Message::new("user", "a"), thought, Message::new("user", "b")];
    assert!(!text(&family("qwen3"), &messages, &[]).contains("Hm."));
    assert!(text(&family("seed-oss"), &messages, &[]).contains("<seed:think>Hm.</seed:think>Yes."));
}

#[test]
fn refusals_are_told_in_the_templates_words() {
    let gemma = family("gemma2");
    let twice = [Message::new("user", "a"), Message::new("user", "b")];
    let error = gemma.render(&Request::new(&twice, DateTime::from_unix(NOW))).expect_err("refused");
    assert_eq!(error.to_string(), "the chat template failed: The user and the model take turns");
    let error = Template::jinja("a\n{% if %}", "", "").expect_err("no condition");
    assert!(matches!(error, Error::Syntax { line: 2, .. }), "{error:?}");
    assert!(matches!(
        template("x").insert("a", "b", None, DateTime::from_unix(0)),
        Err(Error::NoInsert)
    ));
}

#[test]
fn values_are_written_as_python_writes_them() {
    let printed = |expression: &str, value: serde_json::Value| {
        let tool = crate::common::tool("f", "x", json!({ "v": value }));
        let source =
            format!("{{%- set v = tools[0].function.parameters.v -%}}{{{{ {expression} }}}}");
        text(&template(&source), &[Message::new("user", "a")], &[tool])
    };
    assert_eq!(
        printed("v", json!([null, true, 1.0, "it's", {"a": "b"}])),
        "[None, True, 1.0, \"it's\", {'a': 'b'}]"
    );
    assert_eq!(printed("v", json!(1e16)), "1e+16");
    assert_eq!(printed("v", json!(1e15)), "1000000000000000.0");
    assert_eq!(printed("v", json!(0.00001)), "1e-05");
    assert_eq!(printed("v", json!(0.0001)), "0.0001");
    assert_eq!(printed("v", json!(-0.0)), "-0.0");
    assert_eq!(printed("v", json!(123456.75)), "123456.75");
    assert_eq!(printed("v | tojson", json!(1.5e300)), "1.5e+300");
    assert_eq!(printed("v | tojson", json!(1_717_595_548_488_515.2)), "1717595548488515.2");
    assert_eq!(printed("v | tojson", json!("<é\u{7f}>")), "\"<é\u{7f}>\"");
    assert_eq!(
        printed("v | tojson(ensure_ascii=true)", json!("é\u{7f}😀")),
        r#""\u00e9\u007f\ud83d\ude00""#
    );
    assert_eq!(
        printed("v | tojson(indent=1)", json!({"a": [1], "b": {}})),
        "{\n \"a\": [\n  1\n ],\n \"b\": {}\n}"
    );
}

#[test]
fn generation_tags_lines_and_raw_text_are_as_in_jinja2() {
    let rendered = |source: &str| text(&template(source), &[Message::new("user", "a")], &[]);
    assert_eq!(rendered("{% generation %}a{%- endgeneration -%} b"), "ab");
    assert_eq!(rendered("a\r\n{% if true %}\r\nb{% endif %}\rc"), "a\nbc");
    assert_eq!(rendered("{% raw %}\n{{ a }}{% endraw %}\nb"), "\n{{ a }}b");
    assert_eq!(rendered("{% raw -%}\n{% generation %}{% endraw %}"), "{% generation %}");
}

#[test]
fn several_calls_keep_their_order_and_ids() {
    let calls = vec![
        call("aaaaaaaaa", "now", json!({})),
        call("bbbbbbbbb", "search", json!({"query": "x", "exact": true})),
    ];
    let messages =
        [Message::new("user", "a"), Message { tool_calls: calls, ..Message::new("assistant", "") }];
    let prompt = text(&family("mistral-v3"), &messages, &tools());
    let expected = "[TOOL_CALLS] [{\"name\": \"now\", \"arguments\": {}, \"id\": \"aaaaaaaaa\"}, \
                    {\"name\": \"search\", \"arguments\": {\"query\": \"x\", \"exact\": true}, \
                    \"id\": \"bbbbbbbbb\"}]</s>";
    assert!(prompt.ends_with(expected), "{prompt}");
}
