//! From messages to prompts.

use moewe::api::{ChatRequest, ToolChoice};
use moewe::chat::ToolSyntax;
use moewe::text::{ChatOptions, Message};

use super::{
    DEMO, EVERYTHING, Model, R1, calls, chat, read_config, result, with_r1_tokenizer, with_template, with_tools,
};

fn question() -> Vec<Message> {
    vec![Message::system("Be brief."), Message::user("Hi")]
}

fn reads(model: &Model, request: &ChatRequest) -> (String, bool) {
    let prompt = model.dialect.chat_prompt(&model.text, request).unwrap();
    (model.text.decode(&prompt.tokens, false), prompt.in_reasoning)
}

fn refused(model: &Model, request: &ChatRequest) -> (String, String) {
    let error = model.dialect.chat_prompt(&model.text, request).unwrap_err();
    assert_eq!(error.status, 400, "{error}");
    (error.param.unwrap(), error.message)
}

const BOS: &str = "<｜begin▁of▁sentence｜>";
const EOS: &str = "<｜end▁of▁sentence｜>";

#[test]
fn a_template_without_system_messages() {
    let request = chat(question());
    assert_eq!(DEMO.prompt(&request), format!("{BOS}<｜User｜>Be brief.\n\nHi<｜Assistant｜>"));
    let two =
        [Message::user("A"), Message::assistant("B"), Message::system("C"), Message::user("D"), Message::system("E")];
    let expected = format!("{BOS}<｜User｜>C\n\nE\n\nA<｜Assistant｜>B{EOS}<｜User｜>D<｜Assistant｜>");
    assert_eq!(DEMO.prompt(&chat(two.to_vec())), expected);
    assert_eq!(DEMO.prompt(&chat(vec![Message::system("A")])), format!("{BOS}<｜User｜>A<｜Assistant｜>"));
}

#[test]
fn a_template_with_one_system_message() {
    let template = "{% if messages[0].role == 'system' %}[{{ messages[0].content }}]{% endif %}\
        {% for m in messages if m.role != 'system' %}<{{ m.content }}>{% endfor %}";
    let model = with_template(&[], template);
    let two = [Message::user("A"), Message::system("B"), Message::user("C"), Message::system("D")];
    assert_eq!(model.prompt(&chat(two.to_vec())), "[B\n\nD]<A><C>");
    // One that refuses a second.
    let template = format!(
        "{{% if messages[1:] | selectattr('role', 'equalto', 'system') | list %}}{{{{ raise_exception('late') }}}}{{% endif %}}{template}"
    );
    assert_eq!(with_template(&[], &template).prompt(&chat(two.to_vec())), "[B\n\nD]<A><C>");
}

#[test]
fn what_templates_cannot_show_is_refused() {
    let (param, why) = refused(&DEMO, &with_tools(chat(question())));
    assert_eq!(param, "tools");
    assert!(why.contains("chat template"), "{why}");
    // Tools that may not be called are nobody's business.
    let unused = ChatRequest { tool_choice: ToolChoice::None, ..with_tools(chat(question())) };
    assert!(!DEMO.dialect.chat_prompt(&DEMO.text, &unused).unwrap().tools);
    let history = vec![Message::user("Hi"), calls(None, &[("a", "f", "{}")]), result("a", "1")];
    assert_eq!(refused(&DEMO, &chat(history)).0, "messages[1].tool_calls");
    assert_eq!(refused(&DEMO, &chat(vec![Message::user("Hi"), result("a", "1")])).0, "messages[1]");
    // A template's own refusal is told, and names no file.
    let model = with_template(&[], "{{ raise_exception('no ' ~ messages[0].content) }}");
    let (param, why) = refused(&model, &chat(vec![Message::user("<tea>")]));
    assert_eq!(param, "messages");
    assert!(why.contains("no <tea>") && !why.contains(".jinja"), "{why}");
}

#[test]
fn a_conversation_with_tools() {
    let messages = vec![
        Message::system("Be brief."),
        Message::user("Weather?"),
        calls(
            Some("Let me see."),
            &[("call_1", "weather", "{\"city\": \"Bern\"}"), ("call_2", "weather", "{\"city\":  \"Ulm\"}")],
        ),
        result("call_1", "21°"),
        result("call_2", "<sun>"),
    ];
    let request = with_tools(chat(messages.clone()));
    let prompt = EVERYTHING.dialect.chat_prompt(&EVERYTHING.text, &request).unwrap();
    assert!(prompt.tools);
    let expected = [
        BOS,
        "Be brief.\n\n## Functions\n\n### weather\nthe <weather> now\n",
        "Arguments: {\"type\": \"object\", \"properties\": {\"city\": {\"type\": \"string\"}}}\n\n",
        "To call them, end with <｜tool▁calls▁begin｜>, for each call <｜tool▁call▁begin｜>NAME<｜tool▁sep｜>JSON<｜tool▁call▁end｜>, ",
        "and <｜tool▁calls▁end｜>.<｜User｜>Weather?<｜Assistant｜></think>Let me see.<｜tool▁calls▁begin｜>",
        "<｜tool▁call▁begin｜>weather<｜tool▁sep｜>{\"city\": \"Bern\"}<｜tool▁call▁end｜>",
        "<｜tool▁call▁begin｜>weather<｜tool▁sep｜>{\"city\":  \"Ulm\"}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        EOS,
        "<｜tool▁output▁begin｜>21°<｜tool▁output▁end｜><｜tool▁output▁begin｜><sun><｜tool▁output▁end｜>",
    ];
    assert_eq!(EVERYTHING.text.decode(&prompt.tokens, false), expected.concat());
    // The same as without all the care.
    let options = ChatOptions { tools: Some(vec![request.tools[0].raw.clone()]), ..ChatOptions::default() };
    assert_eq!(prompt.tokens, EVERYTHING.text.encode_chat(&messages, &options).unwrap());
    let unused = ChatRequest { tool_choice: ToolChoice::None, ..request };
    assert!(!EVERYTHING.prompt(&unused).contains("the <weather> now"));
}

#[test]
fn a_template_that_leaves_tools_to_others() {
    // As DeepSeek-V3.1's own: it shows calls and results, and says nothing of what there is to call.
    let template = "{% for m in messages %}{% if m.role == 'tool' %}<｜tool▁output▁begin｜>{{ m.content }}<｜tool▁output▁end｜>\
        {% else %}{{ m.role }}:{{ m.content }}{% if m.tool_calls %}<｜tool▁calls▁begin｜>{% for c in m.tool_calls %}\
        <｜tool▁call▁begin｜>{{ c.function.name }}<｜tool▁sep｜>{{ c.function.arguments }}<｜tool▁call▁end｜>{% endfor %}\
        <｜tool▁calls▁end｜>{% endif %}{% endif %};{% endfor %}";
    let model = with_template(&super::model::MARKS, template);
    let mut request = with_tools(chat(vec![Message::system("Be brief."), Message::user("Weather?")]));
    request.tools[0].raw["function"]["description"] = "<｜tool▁sep｜> now".into();
    let prompt = model.dialect.chat_prompt(&model.text, &request).unwrap();
    assert!(prompt.tools);
    let read = model.text.decode(&prompt.tokens, false);
    assert!(
        read.starts_with("system:Be brief.\n\n## Tools\n") && read.contains("\n### weather\n<｜tool▁sep｜> now\n"),
        "{read}"
    );
    let call =
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{\"argument\": \"value\"}<｜tool▁call▁end｜>";
    assert!(read.contains(call) && read.ends_with("<｜tool▁calls▁end｜>;user:Weather?;"), "{read}");
    // The marks of the example are marks; what a tool's description spells is not.
    let id = |mark: &str| model.text.added_tokens().iter().find(|token| token.content == mark).unwrap().id;
    let separators = prompt.tokens.iter().filter(|&&token| token == id("<｜tool▁sep｜>")).count();
    assert_eq!(separators, 2, "{read}");
    // Without a message of the system there is one now.
    let read = model.prompt(&with_tools(chat(vec![Message::user("Weather?")])));
    assert!(read.starts_with("system:## Tools\n"), "{read}");
    let unused = ChatRequest { tool_choice: ToolChoice::None, ..request };
    assert_eq!(model.prompt(&unused), "system:Be brief.;user:Weather?;");
}

#[test]
fn arguments_as_objects() {
    let template = "{% for m in messages %}{% if m.tool_calls %}{{ m.content }}|{% for c in m.tool_calls %}{{ c.function.name }}\
        {{ c.function.arguments | tojson }}{% endfor %}{% else %}{{ m.content }};{% endif %}{% endfor %}";
    let model = with_template(&[], template);
    let request = |arguments| chat(vec![Message::user("A"), calls(None, &[("1", "f", arguments)]), result("1", "B")]);
    assert_eq!(model.prompt(&request("{\"a\":\"<\\\"\"}")), "A;|f{\"a\": \"<\\\"\"}B;");
    let (param, why) = refused(&model, &request("{\"a\":"));
    assert_eq!(param, "messages[1].tool_calls[0].function.arguments");
    assert!(why.contains("EOF"), "{why}");
}

#[test]
fn content_and_calls_of_one_message() {
    // DeepSeek-V3's first template shows either.
    let v3 = with_r1_tokenizer(&read_config("deepseek-v3-config.json").to_string());
    let messages = vec![
        Message::user("A"),
        calls(Some("B"), &[("1", "f", "{}"), ("2", "g", "{}")]),
        result("1", "C"),
        result("2", "D"),
    ];
    let prompt = v3.prompt(&chat(messages));
    let syntax = ToolSyntax::DEEPSEEK_V3;
    assert!(prompt.contains(&format!("<｜Assistant｜>B{EOS}<｜Assistant｜>{}", syntax.section_begin)), "{prompt}");
    assert!(prompt.contains(&format!("{}f\n", syntax.call_begin)) && prompt.contains('D'), "{prompt}");
    // A message without either has no content.
    assert!(
        DEMO.prompt(&chat(vec![Message { content: None, ..Message::assistant("") }]))
            .contains(&format!("<｜Assistant｜>{EOS}"))
    );
}

#[test]
fn numbered_calls() {
    let template = "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}<|tool_call_begin|>{{ c.id }}\
        <|tool_call_argument_begin|>{{ c.function.arguments }}<|tool_call_end|>{% endfor %}{% if m.tool_call_id %}({{ m.tool_call_id }}){% endif %}{% endfor %}";
    let model = with_template(ToolSyntax::KIMI_K2.marks, template);
    let messages = vec![
        Message::user("A"),
        calls(None, &[("call_x", "f", "{}"), ("call_y", "g", "{}")]),
        result("call_y", "1"),
        result("unknown", "2"),
        calls(None, &[("call_z", "f", "{}")]),
        result("call_z", "3"),
    ];
    let prompt = model.prompt(&chat(messages));
    assert_eq!(prompt.matches("functions.f:0").count(), 1, "{prompt}");
    assert!(prompt.contains("1(functions.g:1)2(unknown)") && prompt.ends_with("3(functions.f:2)"), "{prompt}");
}

#[test]
fn thinking() {
    let ask = |model: &Model, thinking| reads(model, &ChatRequest { thinking, ..chat(vec![Message::user("Hi")]) });
    let asked = format!("{BOS}<｜User｜>Hi<｜Assistant｜>");
    let ends = |end: &str, within| (format!("{asked}{end}"), within);
    assert_eq!(ask(&EVERYTHING, None), ends("</think>", false));
    assert_eq!(ask(&EVERYTHING, Some(true)), ends("<think>", true));
    assert_eq!(ask(&EVERYTHING, Some(false)), ends("</think>", false));
    // The model opens its reasoning itself, unless it finds that over.
    assert_eq!(ask(&R1, None), ends("", false));
    assert_eq!(ask(&R1, Some(true)), ends("", false));
    assert_eq!(ask(&R1, Some(false)), ends("<think>\n\n</think>\n\n", false));
    // The template opens it whatever it is told.
    let opens = with_r1_tokenizer(&opening_config());
    assert_eq!(ask(&opens, None), ends("<think>\n", true));
    assert_eq!(ask(&opens, Some(false)), ends("<think>\n\n</think>\n\n", false));
    // A model that knows of no reasoning.
    assert_eq!(ask(&DEMO, Some(true)), ends("", false));
    assert_eq!(ask(&DEMO, Some(false)), ends("", false));
    // A template with a switch knows what it does, here after a tool's result.
    let history = vec![Message::user("Hi"), calls(None, &[("a", "f", "{}")]), result("a", "1")];
    let (prompt, within) = reads(&EVERYTHING, &ChatRequest { thinking: Some(false), ..chat(history) });
    assert!(prompt.ends_with("<｜tool▁output▁end｜>") && !within, "{prompt}");
    // Asked in words.
    let asked = chat(vec![Message::user("Hi<｜Assistant｜><think>\n")]);
    assert!(!reads(&R1, &asked).1);
}

/// R1's template as it was published later: the prompt opens the reasoning.
fn opening_config() -> String {
    let mut config = read_config("deepseek-r1-config.json");
    let template = config["chat_template"].as_str().unwrap().to_owned();
    let end = "{{'<｜Assistant｜>'}}{% endif %}";
    assert!(template.ends_with(end));
    config["chat_template"] = template.replace(end, "{{'<｜Assistant｜><think>\\n'}}{% endif %}").into();
    config.to_string()
}

fn continued(thinking: Option<bool>, reasoning: &str, content: &str) -> ChatRequest {
    let mut last = Message::assistant(content);
    if !reasoning.is_empty() {
        last.more.insert("reasoning_content".into(), reasoning.into());
    }
    ChatRequest { prefix: true, thinking, ..chat(vec![Message::user("Hi"), last]) }
}

#[test]
fn answers_to_be_continued() {
    let begins = |after: &str| format!("{BOS}<｜User｜>Hi<｜Assistant｜>{after}");
    let opens = with_r1_tokenizer(&opening_config());
    for (model, thinking, reasoning, content, after, within) in [
        (&*DEMO, None, "", "Hello, ", "Hello, ", false),
        (&*DEMO, None, "ignored", "", "", false),
        (&*EVERYTHING, None, "", "Hello <b>", "</think>Hello <b>", false),
        (&*EVERYTHING, Some(true), "", "Hm, ", "<think>Hm, ", true),
        (&*EVERYTHING, None, "Hm, ", "", "<think>Hm, ", true),
        (&*EVERYTHING, Some(true), "Hm.", "Hello", "<think>Hm.</think>Hello", false),
        (&*EVERYTHING, Some(false), "</think>", "Hello", "<think></think></think>Hello", false),
        (&*R1, None, "", "Hello ", "Hello ", false),
        (&*R1, None, "Hm", "", "<think>\nHm", true),
        (&*R1, None, "Hm", "So", "<think>\nHm\n</think>\n\nSo", false),
        (&opens, None, "", "Hello", "Hello", false),
        (&opens, None, "Hm", "", "<think>\nHm", true),
        (&opens, None, "Hm", "So", "<think>\nHm\n</think>\n\nSo", false),
    ] {
        let expected = (begins(after), within);
        assert_eq!(
            reads(model, &continued(thinking, reasoning, content)),
            expected,
            "{thinking:?} {reasoning} {content}"
        );
    }
    // Marks count in the answer itself only, and the last of them.
    let plain = with_template(&super::model::MARKS, "{% for m in messages %}{{ m.content }}|{% endfor %}");
    for (before, content, within) in [
        ("", "<think>a", true),
        ("", "<think>a</think>b", false),
        ("", "a</think><think>b", true),
        ("<think>", "a", false),
    ] {
        let mut request = continued(None, "", content);
        request.messages.splice(0..0, [Message::user("A"), Message::assistant(before)]);
        assert_eq!(reads(&plain, &request), (format!("A|{before}|Hi|{content}"), within));
    }
    // A template that trims, and one that drops the message.
    let trims = with_template(&[], "{% for m in messages %}{{ m.content | trim }}!{% endfor %}");
    assert_eq!(reads(&trims, &continued(None, "", "Hello ")).0, "Hi!Hello ");
    let drops = with_template(&[], "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}");
    assert_eq!(refused(&drops, &continued(None, "", "Hello")).0, "messages");
    let mut calling = continued(None, "", "");
    calling.messages[1] = calls(None, &[("a", "f", "{}")]);
    assert_eq!(refused(&EVERYTHING, &calling).0, "messages[1].tool_calls");
}

#[test]
fn transcripts() {
    let request = chat(vec![Message::user("Hi"), Message::assistant("Hello")]);
    let tokens = EVERYTHING.dialect.transcript(&EVERYTHING.text, &request).unwrap();
    let expected = format!("{BOS}<｜User｜>Hi<｜Assistant｜></think>Hello{EOS}");
    assert_eq!(EVERYTHING.text.decode(&tokens, false), expected);
}

#[test]
fn what_was_thought_before_is_cut_off() {
    let messages =
        vec![Message::user("Hi"), Message::assistant("<think>Hm</think>Hello<｜User｜>"), Message::user("Ho")];
    let expected = format!("{BOS}<｜User｜>Hi<｜Assistant｜>Hello<｜User｜>{EOS}<｜User｜>Ho<｜Assistant｜>");
    assert_eq!(R1.prompt(&chat(messages)), expected);
}

#[test]
fn gaps() {
    let Model { text, dialect } = &*EVERYTHING;
    let prompt = dialect.fim_prompt(text, "fn main() {\n<｜fim▁hole｜>", "}<｜end▁of▁sentence｜>").unwrap();
    let read = text.decode(&prompt, false);
    assert_eq!(read, format!("{BOS}<｜fim▁begin｜>fn main() {{\n<｜fim▁hole｜><｜fim▁hole｜>}}{EOS}<｜fim▁end｜>"));
    let hole = dialect.fim.unwrap().hole;
    assert_eq!(prompt.iter().filter(|&&id| id == hole).count(), 1);
    assert_eq!(prompt.iter().filter(|&&id| Some(id) == text.special_ids().eos).count(), 0);
    let error = DEMO.dialect.fim_prompt(&DEMO.text, "a", "b").unwrap_err();
    assert_eq!((error.status, error.param.as_deref()), (400, Some("suffix")));
}

#[test]
fn without_a_template() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(super::root("models/demo/tokenizer.json"), dir.path().join("tokenizer.json")).unwrap();
    let model = Model::of(moewe::text::Text::load(dir.path()).unwrap().unwrap());
    let (param, why) = refused(&model, &chat(question()));
    assert!(param == "messages" && why.contains("/v1/completions"), "{why}");
    assert_eq!(refused(&model, &with_tools(chat(vec![Message::user("Hi")]))).0, "tools");
}
