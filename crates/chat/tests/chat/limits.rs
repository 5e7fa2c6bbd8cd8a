//! What templates may take.

use serde_json::{Value, json};
use tierstream_chat::{DateTime, Error, Message, Request, Template, limits};

use crate::common::tool;

fn rendered(template: &Template) -> Result<String, Error> {
    let parameters = json!({"s": "a".repeat(1000), "deep": deep(90)});
    let tools = [tool("f", "x", parameters)];
    let messages = [Message::new("user", "a")];
    template.render(&Request { tools: &tools, ..Request::new(&messages, DateTime::from_unix(0)) })
}

fn deep(depth: usize) -> Value {
    (0..depth).fold(json!(1), |value, _| json!([value]))
}

#[test]
fn jinja_that_takes_too_much_is_stopped() {
    let p = "{%- set p = tools[0].function.parameters -%}";
    let all = "{% for a in range(10000) %}{% for b in range(10000) %}";
    for source in [
        format!("{all}{{% endfor %}}{{% endfor %}}"),
        format!("{all}x{{% endfor %}}{{% endfor %}}"),
        format!(
            "{p}{{% set ns = namespace(s=p.s) %}}{{% for i in range(60) %}}{{% set ns.s = ns.s + ns.s %}}{{% endfor %}}"
        ),
        format!(
            "{p}{{% set ns = namespace(s=p.s) %}}{{% for i in range(60) %}}{{% set ns.s = ns.s ~ ns.s %}}{{% endfor %}}"
        ),
        format!(
            "{p}{{% for i in range(90000) %}}{{{{ p.s }}}}{{% endfor %}}{{% for i in range(90000) %}}{{{{ p.s }}}}{{% endfor %}}"
        ),
        format!("{p}{{% for i in range(90000) %}}{{{{ p | tojson | length }}}}{{% endfor %}}"),
        format!(
            "{p}{{% for i in range(90000) %}}{{{{ p.s.replace('a', p.s) | length }}}}{{% endfor %}}"
        ),
        format!("{p}{{{{ p.s * 1000000000 }}}}"),
        format!("{p}{{{{ p.s.ljust(100000000000) }}}}"),
        format!("{p}{{{{ p.s.center(100000000000) }}}}"),
        "{{ 'a'.zfill(999999999999) }}".to_owned(),
        "{% macro m(n) %}{{ m(n) }}{{ m(n) }}{% endmacro %}{{ m(1) }}".to_owned(),
        "{% for x in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}".to_owned(),
    ] {
        // What goes on for ever is stopped while the template is tried out, so that it is no error to read it.
        let template = Template::jinja(&source, "", "").expect("it is well-formed");
        match rendered(&template) {
            Err(Error::OutOfFuel | Error::Render(_)) => {}
            other => panic!("{source}: {} bytes", other.map_or(0, |text| text.len())),
        }
    }
}

#[test]
fn go_that_takes_too_much_is_stopped() {
    for source in [
        "{{ range 100000 }}{{ range 100000 }}{{ end }}{{ end }}",
        "{{ range 100000 }}{{ range 100000 }}x{{ end }}{{ end }}",
        "{{ $s := \"aaaaaaaa\" }}{{ range 60 }}{{ $s = print $s $s }}{{ end }}",
        "{{ $s := \"aaaaaaaa\" }}{{ range 60 }}{{ $s = printf \"%s%s\" $s $s }}{{ end }}",
        "{{ $s := .Tools }}{{ range 100000 }}{{ range 100000 }}{{ $s = json $s }}{{ end }}{{ end }}",
        "{{ range 100000 }}{{ range 1000 }}{{ json $.Tools }}{{ end }}{{ end }}",
        "{{ range 9223372036854775807 }}{{ end }}",
    ] {
        let source = format!("{{{{ range .Messages }}}}{{{{ end }}}}{source}");
        let template = Template::go(&source).expect("it is well-formed");
        assert!(matches!(rendered(&template), Err(Error::OutOfFuel)), "{source}");
    }
}

#[test]
fn long_and_deep_templates_are_refused() {
    let long = "a".repeat(limits::TEMPLATE_BYTES + 1);
    for read in [Template::jinja(&long, "", ""), Template::go(&long)] {
        assert!(matches!(read, Err(Error::TooLong { bytes }) if bytes == long.len()));
    }
    assert!(Template::go(&long[1..]).is_ok());
    let nested = |open: &str, inner: &str, close: &str, count: usize| {
        open.repeat(count) + inner + &close.repeat(count)
    };
    for source in [
        nested("{{ if true }}", "", "{{ end }}", 20_000),
        format!("{{{{ {} }}}}", nested("(", "1", ")", 100_000)),
        format!("{{{{ if 0 }}}}{}{{{{ end }}}}", "{{ else if 0 }}".repeat(20_000)),
    ] {
        assert!(matches!(Template::go(&source), Err(Error::Syntax { .. })));
    }
    let chains = [
        "not ",
        "-",
        "[0] ",
        "+ 1 ",
        "|string ",
        " if 1 else 1",
        ".b",
        "()",
        " and 1",
        "**1",
        " is string",
        " == 1",
    ];
    let chains = chains.iter().flat_map(|link| {
        [1_000, 100_000].map(|n| {
            let links = link.repeat(n.min(1_000_000 / link.len()));
            [
                format!("{{{{ {links}1 }}}}"),
                format!("{{{{ 1{links} }}}}"),
                format!("{{{{ 1{links}"),
                format!("{{% if 1{links} %}}"),
            ]
        })
    });
    for source in [
        nested("{% if true %}", "", "{% endif %}", 20_000),
        format!("{{{{ {} }}}}", nested("(", "1", ")", 100_000)),
        format!("{{{{ {} }}}}", nested("[", "", "]", 100_000)),
        format!("{{{{ {} }}}}", nested("{1:", "1", "}", 100_000)),
        format!("{{% if 1 %}}{}{{% endif %}}", "{%- elif 1 %}".repeat(70_000)),
        format!("{{% if 1 %}}{}{{% endif %}}", "{% elif 1 %}".repeat(500)),
        nested("{% generation %}", "", "{% endgeneration %}", 20_000),
        nested("{% for a in a %}", "", "{% endfor %}", 20_000),
        nested("{% macro a() %}", "", "{% endmacro %}", 20_000),
        // What hides a tag's end from who does not look closely.
        format!("{{% raw %}}{{{{ ' {{% endraw %}}{{{{ 1{} }}}}", "+1".repeat(100_000)),
        format!("{{{{ {{'a': {{}}}} {} }}}}", "~1".repeat(100_000)),
        format!("{{# {{{{ ' #}}{{{{ 1{} }}}}", "+1".repeat(100_000)),
        format!("{{{{ '}}}}{{{{' }}}}{{{{ 1{} }}}}", "+1".repeat(100_000)),
    ]
    .into_iter()
    .chain(chains.flatten())
    {
        // Read or refused: it is there that a stack would overflow.
        let _ = Template::jinja(&source, "", "").and_then(|template| rendered(&template));
    }
}

#[test]
fn values_may_be_as_deep_as_json_is() {
    let template = |source: &str| Template::jinja(source, "", "").expect("it is well-formed");
    let source = "{{ tools[0].function.parameters.deep | tojson }}";
    assert_eq!(
        rendered(&template(source)).expect("not too deep"),
        "[".repeat(90) + "1" + &"]".repeat(90)
    );
    let tools = [tool("f", "x", json!({"deep": deep(limits::JSON_DEPTH + 1)}))];
    let messages = [Message::new("user", "a")];
    let request = Request { tools: &tools, ..Request::new(&messages, DateTime::from_unix(0)) };
    assert!(matches!(template(source).render(&request), Err(Error::Render(_))));
}

#[test]
fn long_chats_have_fuel_for_each_message() {
    let source =
        "{% for m in messages %}{% for i in range(300) %}{% endfor %}{{ m.content }}{% endfor %}";
    let template = Template::jinja(source, "", "").expect("it is well-formed");
    let messages = vec![Message::new("user", "a"); 5000];
    let text = template.render(&Request::new(&messages, DateTime::from_unix(0)));
    assert_eq!(text.expect("it has enough").len(), 5000);
}
