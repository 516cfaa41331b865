//! Chat templates.

use super::*;

/// Conversations and template constructs against Python's jinja2; see `tests/data/tokenizers/chat_cases.py`.
#[test]
fn templates_render_as_in_python() {
    for case in read_json("tests/data/tokenizers/chat-cases.json").as_array().unwrap() {
        let name = case["name"].as_str().unwrap();
        let own;
        let text = match (case["model"].as_str(), case["template"].as_str()) {
            (Some("deepseek-v3"), _) => &*V3,
            (Some("deepseek-r1"), _) => &*R1,
            (_, template) => {
                own = with_template(template.unwrap());
                &own
            }
        };
        let options = ChatOptions {
            add_generation_prompt: case["add_generation_prompt"].as_bool().unwrap(),
            tools: case["tools"].as_array().cloned(),
            ..ChatOptions::default()
        };
        match (text.render_chat(&messages(&case["messages"]), &options), case["rendered"].as_str()) {
            (Ok(found), Some(expected)) => assert_eq!(found, expected, "{name}"),
            (Err(TextError::TemplateRender { detail, .. }), None) => {
                let expected = case["error"].as_str().unwrap();
                assert!(detail.contains(expected), "{name}: {detail} lacks {expected}");
            }
            (found, expected) => panic!("{name}: found {found:?}, expected {expected:?}"),
        }
    }
}

/// The demo's tokenizer with another chat template.
fn with_template(template: &str) -> Text {
    let dir = model(&[("tokenizer.json", &demo_file("tokenizer.json")), ("chat_template.jinja", template.as_bytes())]);
    load(&dir).unwrap()
}

#[test]
fn templates_are_found_where_publishers_put_them() {
    let tokenizer = demo_file("tokenizer.json");
    let render = |files: &[(&str, Value)], tools: Option<Vec<Value>>| {
        let texts: Vec<(&str, String)> = files
            .iter()
            .map(|(name, value)| (*name, value.as_str().map_or(value.to_string(), str::to_owned)))
            .collect();
        let mut all: Vec<(&str, &[u8])> = texts.iter().map(|(name, text)| (*name, text.as_bytes())).collect();
        all.push(("tokenizer.json", &tokenizer));
        let options = ChatOptions { tools, ..ChatOptions::default() };
        load(&model(&all))?.render_chat(&[Message::user("Hi")], &options)
    };
    let config = |template: Value| ("tokenizer_config.json", json!({"bos_token": BOS, "chat_template": template}));
    let list = json!([{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]);
    assert_eq!(render(&[config(json!("{{ bos_token }}"))], None).unwrap(), BOS);
    assert_eq!(render(&[config(list.clone())], None).unwrap(), "plain");
    assert_eq!(render(&[config(list.clone())], Some(vec![])).unwrap(), "tools");
    assert_eq!(render(&[config(json!([{"name": "rag", "template": "lone"}]))], None).unwrap(), "lone");
    assert_eq!(
        render(&[config(json!("config")), ("chat_template.jinja", json!("{{ bos_token }}file\n"))], None).unwrap(),
        format!("{BOS}file")
    );
    assert_eq!(render(&[("chat_template.json", json!({"chat_template": "json"}))], None).unwrap(), "json");
    assert!(matches!(render(&[], None), Err(TextError::NoChatTemplate { .. })));
    for bad in
        [json!(7), json!([]), json!([{"name": "a", "template": "x"}, {"name": "b", "template": "y"}]), json!([1])]
    {
        let error = render(&[config(bad.clone())], None).unwrap_err().to_string();
        assert!(error.contains("tokenizer_config.json: field `chat_template` is"), "{bad}: {error}");
    }
}

#[test]
fn template_variables_and_the_date() {
    let text = with_template("{{ thinking }} {{ strftime_now('%Y').isdigit() }} {{ strftime_now('%d %b %Y')|length }}");
    let variables = json!({"thinking": true}).as_object().unwrap().clone();
    let options = ChatOptions { variables, ..ChatOptions::default() };
    assert_eq!(text.render_chat(&[], &options).unwrap(), "True True 11");
}

#[test]
fn endless_and_swelling_templates_are_stopped() {
    let endless = "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}";
    let swelling = "{% set x = 'abcdefgh' * 1000000 %}{% for a in range(9999) %}{{ x }}{% endfor %}";
    for template in [endless, swelling] {
        let error = with_template(template).render_chat(&[], &ChatOptions::default()).unwrap_err();
        assert!(matches!(error, TextError::TemplateLimit { .. }), "{error}");
        assert!(error.to_string().contains("chat_template.jinja"), "{error}");
    }
}

#[test]
fn hostile_templates_fail_cleanly() {
    let runs = [
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% include 'default' %}",
        "{% include '/etc/passwd' %}",
        "{% import 'x' as y %}",
        "{% extends 'default' %}",
        "{{ 'a' | indent(9223372036854775807) }}",
        "{{ 'a' | indent(width=99999999999) }}",
        "{{ 'a' * 9223372036854775807 }}",
        "{{ '{:>99999999999}'.format(1) }}",
        "{{ '%99999999999d' | format(1) }}",
        "{{ [] | tojson(indent=99999999999999) }}",
        "{{ range(99999999999999) }}",
        "{{ messages[99].role.x }}",
        "{{ strftime_now('%') }}",
        "{{ strftime_now(7, 8) }}",
        "{{ 1 // 0 }}",
        "{{ -9223372036854775808 // -1 }}{{ 2 ** 99999 }}",
        "{{ 'a'.nosuch() }}",
        "{{ raise_exception('no') }}",
    ];
    for template in runs {
        let result = with_template(template).render_chat(&[Message::user("Hi")], &ChatOptions::default());
        let Err(error) = result else { panic!("{template} rendered {result:?}") };
        assert!(error.to_string().contains("chat_template.jinja: the chat template failed: "), "{template}: {error}");
        assert!(!error.to_string().contains('\n'), "{error}");
    }
    let deep = format!("{{{{ {} }}}}", "(".repeat(100_000));
    let lists = format!("{{{{ {} }}}}", "[".repeat(100_000));
    let blocks = "{% if 1 %}".repeat(100_000);
    let broken = ["{{", "{% for %}", "{% if %}", "{{ a b }}", "{% endfor %}", "{{ 'a", &deep, &lists, &blocks];
    for template in broken {
        let dir =
            model(&[("tokenizer.json", &demo_file("tokenizer.json")), ("chat_template.jinja", template.as_bytes())]);
        let error = load(&dir).unwrap_err();
        assert!(matches!(error, TextError::TemplateSyntax { .. }), "{error}");
    }
}
