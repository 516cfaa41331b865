//! The chat page in a browser, against the server that it belongs to.

use std::path::Path;

use serde_json::json;

#[path = "page/browser.rs"]
mod browser;
#[path = "common/cli.rs"]
#[allow(unused_imports)] // its macro is for other tests
mod cli;
#[path = "serve/mod.rs"]
mod serve;

use browser::Browser;
use serve::Server;

const KEY: &str = "sk-0123456789abcdef0123456789abcdef";

/// A browser. Without one the page was not tested, which nobody is to overlook.
fn browser() -> Browser {
    Browser::start().expect("Chromium is there to test the chat page (Debian: apt install chromium)")
}

/// Writes a message and sends it.
fn send(browser: &Browser, text: &str) {
    browser.until("document.activeElement.id === 'message' && !document.querySelector('#send').hidden");
    browser.write(text);
    browser.press("Enter", false);
}

/// The element of an answer, counted from 0, as an expression.
fn answer(index: usize, selector: &str) -> String {
    format!("document.querySelectorAll('article.assistant')[{index}].querySelector('{selector}')")
}

#[test]
fn a_person_opens_the_page_and_talks_with_the_model() {
    let browser = browser();
    let keys = cli::root().join("page-keys");
    std::fs::write(&keys, format!("ada {KEY}\n")).unwrap();
    let money = ["--price-input", "1", "--price-output", "2", "--api-key-file", keys.to_str().unwrap()];
    let server = Server::start(&money);
    browser.look(900, 800, false);
    browser.open(&format!("http://{}", server.address));

    // The server wants a key.
    browser.until("!document.querySelector('#door').hidden");
    assert_eq!(browser.evaluate("document.querySelector('#composer').hidden"), true);
    browser.write("wrong");
    browser.press("Enter", false);
    browser.until("document.querySelector('#refusal').textContent.includes('not known')");
    browser.write(KEY);
    browser.press("Enter", false);
    browser.until("document.querySelector('#door').hidden && document.querySelector('#model').textContent === 'demo'");
    let complaints = browser.complaints();
    assert!(complaints.iter().all(|complaint| complaint.contains("401")), "{complaints:#?}");

    // A text with a tag in it, whose second line is begun with Shift+Enter.
    for (field, value) in [("max_tokens", "24"), ("temperature", "0.8"), ("seed", "3"), ("system", "Be brief.")] {
        browser.evaluate(&format!("document.querySelector('#{field}').value = '{value}'"));
    }
    browser.write("<script>document.title = 'owned'</script>");
    browser.press("Enter", true);
    send(&browser, "The king said to");
    browser.until("document.querySelector('.account')");
    let asked = "<script>document.title = 'owned'</script>\nThe king said to";
    assert_eq!(browser.text("document.querySelector('article.user .text').textContent"), asked);

    // The same without the page, and not streamed.
    let body = json!({
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": asked}],
        "max_tokens": 24, "temperature": 0.8, "seed": 3
    });
    let headers = json!({"authorization": format!("Bearer {KEY}"), "content-type": "application/json"});
    let options = json!({"method": "POST", "headers": headers, "body": body.to_string()});
    let plain = browser.evaluate(&format!("fetch('/v1/chat/completions', {options}).then((answer) => answer.json())"));
    let text = browser.text(&(answer(0, ".text") + ".textContent"));
    assert!(!text.is_empty());
    assert_eq!(plain["choices"][0]["message"]["content"], text);
    let account = browser.text(&(answer(0, ".account") + ".textContent"));
    let (prompt, completion) = (&plain["usage"]["prompt_tokens"], &plain["usage"]["completion_tokens"]);
    // A dollar a million for what is read, two for what is written.
    let cost = (prompt.as_f64().unwrap() + 2.0 * completion.as_f64().unwrap()) / 1e6;
    let cost = format!("cost {}", browser.text(&format!("({cost}).toPrecision(3)")));
    for part in [format!("prompt {prompt} (cached 0)"), format!("answer {completion}"), cost.clone()] {
        assert!(account.contains(&part), "{part:?} is not in {account:?}");
    }
    let reason = if plain["choices"][0]["finish_reason"] == "stop" { "complete" } else { "cut off at the limit" };
    assert!(account.contains(reason), "{account}");
    let sum = browser.text("document.querySelector('#sum').textContent");
    assert!(sum.contains(&cost) && sum.contains(&format!("prompt {prompt} ")), "{sum}");

    // The strip has a cell for each expert of each layer, and they differ.
    let shape = browser.evaluate(&format!("fetch('/v1/models', {{headers: {headers}}}).then((list) => list.json())"));
    let shape = &shape["data"][0]["moewe"];
    let size = browser.evaluate("[document.querySelector('#strip').width, document.querySelector('#strip').height]");
    assert_eq!(size, json!([shape["experts"], shape["moe_layers"]]));
    let strip = "document.querySelector('#strip')";
    let pixels = format!(
        "new Set(new Uint32Array({strip}.getContext('2d').getImageData(0, 0, {strip}.width, {strip}.height).data.buffer)).size"
    );
    browser.until(&format!("{pixels} > 3"));
    let label = browser.text(&format!("{strip}.getAttribute('aria-label')"));
    assert!(label.contains("layer 1 expert "), "{label}");

    // A long answer is stopped, and the conversation goes on. Some answers are over before anybody can stop them.
    browser.evaluate("document.querySelector('#max_tokens').value = ''");
    let stopped = (1..10).find(|&index| {
        browser.evaluate(&format!("document.querySelector('#seed').value = '{index}'"));
        browser.evaluate("document.querySelector('#message').value = ''");
        send(&browser, "And then");
        browser.until(&format!("{}.textContent || {}", answer(index, ".text"), answer(index, ".account")));
        browser.press("Escape", false);
        browser.until(&answer(index, ".account"));
        browser.text(&(answer(index, ".account") + ".textContent")).starts_with("stopped")
    });
    let stopped = stopped.expect("one of nine answers is stopped");
    browser.evaluate("document.querySelector('#max_tokens').value = '16'");
    browser.evaluate("document.querySelector('#message').value = ''");
    send(&browser, "Verily");
    browser.until(&answer(stopped + 1, ".account"));

    // What the server refuses is said, and the message is there to be changed.
    browser.evaluate("document.querySelector('#max_tokens').value = '123456789'");
    browser.evaluate("document.querySelector('#temperature').value = '77'");
    send(&browser, "Too hot");
    browser.until("document.querySelector('.problem')");
    let problem = browser.text("document.querySelector('.problem').textContent");
    assert!(problem.contains("temperature") || problem.contains("max_tokens"), "{problem}");
    assert_eq!(browser.text("document.querySelector('#message').value"), "Too hot");

    assert_eq!(browser.text("document.title"), "demo — moewe");
    let complaints = browser.complaints();
    assert!(complaints.iter().all(|complaint| complaint.contains("400")), "{complaints:#?}");
    for (width, dark) in [(320, true), (1600, false)] {
        browser.look(width, 600, dark);
        browser.until(&format!("document.documentElement.scrollWidth <= {width}"));
    }
    browser.click("#anew");
    browser.until("document.querySelectorAll('article').length === 0");
    if std::env::var_os("UPDATE_SNAPSHOTS").is_some() {
        draw(&browser);
    }
}

/// The picture in `docs/viewer.md`.
fn draw(browser: &Browser) {
    browser.look(900, 560, false);
    for (field, value) in [("max_tokens", "64"), ("temperature", "0.7"), ("seed", "7"), ("system", ""), ("message", "")]
    {
        browser.evaluate(&format!("document.querySelector('#{field}').value = '{value}'"));
    }
    let texts = ["The king said to his servants, Let us go up to the city.", "What did they answer?"];
    for (index, text) in texts.into_iter().enumerate() {
        send(browser, text);
        browser.until(&answer(index, ".account"));
    }
    let place = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/pictures/page.png");
    std::fs::write(place, browser.picture()).unwrap();
}

/// What a server would have to send that wants to do harm, and what none of ours is made to send at will.
const STREAM: &str = r#"
window.fetch = async () => {
  const parts = [
    ': keep-alive\n\n',
    'data: {"choices":[{"delta":{"role":"assistant"}}]}\r\n\r\n',
    'data: {"choices":[{"delta":{"reasoning_content":"<b>Hm</b>, "}}]}\n\ndata: {"choices":[{"delta":{"reasoning_',
    'content":"so."}}]}\n\n',
    'data: {"choices":[{"delta":{"content":"<img src=x onerror=\\"window.owned=1\\"><script>window.owned=1</script>"},',
    '"routed_experts":[[[999999,0]],[["x",-1]]]}]}\n\n',
    'data: {"choices":[{"delta":{"content":"\ud83e\udd80"},"finish_reason":"length"}],"usage":null}\n\n',
    'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2,"prompt_cache_hit_tokens":1,',
    '"completion_tokens_details":{"reasoning_tokens":1}}}\n\n',
    'data: [DONE]\n\n',
  ];
  const bytes = new TextEncoder().encode(parts.join(''));
  const body = new ReadableStream({
    start(stream) {
      for (let at = 0; at < bytes.length; at += 7) stream.enqueue(bytes.slice(at, at + 7));
      stream.close();
    },
  });
  return new Response(body, {status: 200});
};"#;

#[test]
fn whatever_a_model_writes_is_only_text() {
    let browser = browser();
    let server = Server::start(&[]);
    browser.look(700, 700, true);
    browser.open(&format!("http://{}", server.address));
    browser.until("document.querySelector('#model').textContent === 'demo'");
    browser.evaluate(STREAM);
    send(&browser, "<img src=x onerror='window.owned=1'>");
    browser.until("document.querySelector('.account')");
    let text = browser.text(&(answer(0, ".text") + ".textContent"));
    assert_eq!(text, "<img src=x onerror=\"window.owned=1\"><script>window.owned=1</script>\u{1f980}");
    let reasoning = answer(0, ".reasoning");
    assert_eq!(browser.text(&format!("{reasoning}.querySelector('div').textContent")), "<b>Hm</b>, so.");
    assert_eq!(browser.evaluate(&format!("{reasoning}.open")), false, "reasoning is folded away");
    assert_eq!(browser.evaluate(&format!("{reasoning}.querySelector('div').checkVisibility()")), false);
    browser.click("details.reasoning summary");
    browser.until(&format!("{reasoning}.querySelector('div').checkVisibility()"));
    let account = browser.text(&(answer(0, ".account") + ".textContent"));
    assert!(account.starts_with("prompt 3 (cached 1) · answer 2 (reasoning 1)"), "{account}");
    assert!(account.ends_with("cut off at the limit of tokens") && !account.contains("cost"), "{account}");
    assert_eq!(browser.evaluate("document.querySelectorAll('img, article script, article b').length"), 0);
    assert_eq!(browser.complaints(), Vec::<String>::new());

    // Even a tag that got into the page would not be run.
    browser.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.owned=1'}))",
    );
    browser.evaluate("document.body.insertAdjacentHTML('beforeend', `<img src=x onerror='window.owned=1'>`)");
    let complaints = browser.complaints();
    assert!(complaints.iter().any(|complaint| complaint.contains("Content Security Policy")), "{complaints:#?}");
    assert_eq!(browser.evaluate("window.owned === undefined"), true);

    // A connection that breaks off in the middle.
    browser.evaluate(
        "window.fetch = async () => new Response('data: {\"choices\":[{\"delta\":{\"content\":\"half\"}}]}\\n\\n')",
    );
    send(&browser, "again");
    browser.until("document.querySelector('.problem')");
    assert_eq!(browser.text(&(answer(1, ".text") + ".textContent")), "half");
    assert!(browser.text("document.querySelector('.problem').textContent").contains("ended before"));
}
