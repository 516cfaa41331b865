//! Answers that follow a grammar, through the engine: whatever the model would like to say, the text fits.

#[path = "constrained/schemas.rs"]
mod schemas;

use std::collections::VecDeque;
use std::path::Path;
use std::sync::Arc;

use moewe::api::{OutputFormat, Tool, ToolChoice};
use moewe::chat::ToolSyntax;
use moewe::grammar::Grammars;
use moewe::text::Text;
use moewe_compiler::checkpoint::Checkpoint;
use moewe_compiler::compile::{Options, compile};
use moewe_compiler::profile::Profile;
use moewe_plan::{Bundle, Precision, ProgramKind, Sampling, TapChoice};
use moewe_runtime::engine::{Constraint, Engine, EngineOptions, Request, Stream};
use moewe_runtime::{Gpu, Model, Selector, Session, SessionOptions, StopReason};
use schemas::{Random, Reach};
use serde_json::{Value, json};

/// Sequences at once.
const TOGETHER: usize = 64;

/// The demo model with an engine.
struct Demo {
    text: Arc<Text>,
    grammars: Grammars,
    engine: Engine,
}

impl Demo {
    fn new() -> Self {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/demo");
        let temp = tempfile::tempdir().unwrap();
        let profile = Profile::load("lavapipe").unwrap();
        let options = Options {
            profile,
            weights: None,
            reference: false,
            plan_only: false,
            latents: moewe_plan::Latent::F16,
            taps: TapChoice::all(),
        };
        compile(&Checkpoint::open(&dir).unwrap(), &options, &temp.path().join("bundle"), &|_, _| ()).unwrap();
        let bundle = Bundle::open(&temp.path().join("bundle")).unwrap();
        let gpu = Gpu::open(&Selector::Default).expect("a Vulkan device; `make setup` installs a software one");
        let model = Model::load(&gpu, &bundle, &|_| ()).unwrap();
        let text = Arc::new(Text::load(&dir).unwrap().expect("a tokenizer"));
        let grammars = Grammars::new(&text, model.plan().model.vocab_size, &text.eos_ids()).unwrap();
        let options = SessionOptions {
            precision: Precision::Exact,
            kinds: vec![ProgramKind::Forward],
            max_sequences: TOGETHER as u32,
            pages: Some(TOGETHER as u32 * 12),
            ..SessionOptions::default()
        };
        let engine = Engine::new(Session::new(model, options).unwrap(), &EngineOptions::default()).unwrap();
        Self { text, grammars, engine }
    }

    fn submit(&self, prompt: &str, seed: u64, constraint: Box<dyn Constraint>) -> Stream {
        let sampling = Sampling { temperature: 1.0, seed_low: seed as u32, ..Sampling::default() };
        let prompt = self.text.encode(prompt, true).unwrap();
        let constraint = Some(constraint);
        self.engine.submit(Request { prompt, max_new_tokens: 600, sampling, constraint, ..Request::default() }).unwrap()
    }

    /// The text of an answer, which ended by itself, and how many tokens it has.
    fn answer(&self, stream: Stream) -> (String, usize) {
        let (mut ids, finished) = stream.finish().unwrap();
        let text = self.text.decode(&ids, false);
        assert_eq!(finished.stop_reason, StopReason::Eos, "{text}");
        ids.retain(|id| !self.text.eos_ids().contains(id));
        (self.text.decode(&ids, false), ids.len())
    }
}

/// Something to continue: words of a story, and now and then the schema, as clients write it into their prompts.
fn prompt(random: &mut Random, wanted: &Value) -> String {
    const WORDS: [&str; 12] =
        ["Once", "upon", "a time", "there was", "fn main()", "{\"a\":", "the", "of", "42", "\n", "écoute", "return"];
    let words: Vec<&str> = (0..=random.below(12)).map(|_| *random.of(&WORDS)).collect();
    if random.chance(4) { format!("{} {wanted} ", words.join(" ")) } else { words.join(" ") }
}

#[test]
fn a_thousand_answers_fit_their_schemas() {
    let demo = Demo::new();
    let (mut running, mut lengths) = (VecDeque::new(), Vec::new());
    let mut check = |(seed, wanted, stream): (u64, Value, Stream)| {
        let (text, tokens) = demo.answer(stream);
        let value: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("seed {seed}: {wanted}: {e}: {text}"));
        let error = jsonschema::validate(&wanted, &value).err().map(|error| error.to_string());
        assert_eq!(error, None, "seed {seed}: {wanted}: {text}");
        lengths.push(tokens);
    };
    for seed in 0..1_000 {
        let mut random = Random(seed);
        let wanted = schemas::schema(&mut random, Reach::Short);
        let format = OutputFormat::JsonSchema { name: "answer".into(), schema: wanted.clone() };
        let constraint = demo.grammars.constraint(&format).unwrap().expect("not any text");
        let stream = demo.submit(&prompt(&mut random, &wanted), seed, constraint);
        running.push_back((seed, wanted, stream));
        // Some wait, so that none of the places is ever free.
        if running.len() > TOGETHER + 16 {
            check(running.pop_front().expect("many"));
        }
    }
    running.into_iter().for_each(&mut check);
    lengths.sort_unstable();
    let (sum, most) = (lengths.iter().sum::<usize>(), lengths[lengths.len() - 1]);
    println!("{} answers of {} tokens on average, {most} at most", lengths.len(), sum / lengths.len());
    assert_eq!(lengths.len(), 1_000);
    assert!(sum > 10_000, "{sum} tokens are too few to show anything");
}

#[test]
fn other_formats_and_calls() {
    let demo = Demo::new();
    let weather = json!({"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]});
    let tool = |name: &str| Tool {
        name: name.into(),
        description: None,
        parameters: weather.clone(),
        strict: true,
        raw: Value::Null,
    };
    let syntax = ToolSyntax::DEEPSEEK_V31;
    let mut running = Vec::new();
    for seed in 0..8 {
        let pattern = OutputFormat::Regex(r"(yes|no), \d{2} times".into());
        let pattern = || demo.grammars.constraint(&pattern).unwrap().expect("not any text");
        let calls = demo.grammars.tool_calls(&syntax, &[tool("weather"), tool("sun")], &ToolChoice::Required, false);
        let calls = calls.unwrap().expect("some");
        // A marker that the model comes to soon.
        let after = demo.grammars.after("e", pattern());
        running.push([
            demo.submit("Is it so? ", seed, pattern()),
            demo.submit("Once upon a time", seed, after),
            demo.submit("What is the weather?", seed, calls),
        ]);
    }
    for [pattern, after, calls] in running {
        let fits = |text: &str| {
            let rest = text.strip_prefix("yes, ").or_else(|| text.strip_prefix("no, "));
            let number = rest.and_then(|rest| rest.strip_suffix(" times"));
            number.is_some_and(|number| number.len() == 2 && number.bytes().all(|byte| byte.is_ascii_digit()))
        };
        let (text, _) = demo.answer(pattern);
        assert!(fits(&text), "{text}");
        let (text, _) = demo.answer(after);
        assert!(text.split_once('e').is_some_and(|(_, behind)| fits(behind)), "{text}");
        let (text, _) = demo.answer(calls);
        let call = text.strip_prefix(syntax.section_begin).and_then(|rest| rest.strip_suffix(syntax.section_end));
        let call = call.and_then(|rest| rest.strip_prefix(syntax.call_begin)?.strip_suffix(syntax.call_end));
        let (name, arguments) = call.and_then(|call| call.split_once(syntax.arguments_begin)).expect("a call");
        assert!(["weather", "sun"].contains(&name), "{text}");
        assert!(jsonschema::is_valid(&weather, &serde_json::from_str(arguments).expect("JSON")), "{text}");
    }
}
