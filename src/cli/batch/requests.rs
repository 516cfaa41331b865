//! The file of requests.

use std::fmt;
use std::fs::{self, File};
use std::path::Path;

use anyhow::Context;
use moewe::text::{ChatOptions, Message, TEXT_FILES, Text};
use moewe_plan::Sampling;
use moewe_runtime::GenerateOptions;
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::{Value, json};

use super::lines::Lines;
use crate::cli::args::RunArgs;
use crate::cli::generate::{self, eos};
use crate::cli::interrupt;
use crate::cli::model::Opened;

/// Longest line, in bytes.
const MAX_LINE: u64 = 64 << 20;
/// What a request may say.
const FIELDS: [&str; 14] = [
    "prompt",
    "tokens",
    "messages",
    "id",
    "max_new_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "seed",
    "stop_token_ids",
    "ignore_eos",
    "priority",
];

/// A hash of all that a result depends on.
pub type Hash = u64;

/// What to continue.
#[derive(Debug)]
enum Prompt {
    Text(String),
    Tokens(Vec<u32>),
    Chat(Vec<Message>),
}

/// A request and where it stands.
#[derive(Debug)]
pub struct Numbered {
    /// Its line.
    pub number: u64,
    /// What the user calls it; null without a name.
    pub id: Value,
    prompt: Prompt,
    /// How it is continued.
    pub options: GenerateOptions,
    /// Higher ones come first.
    pub priority: i32,
    /// Tells whether a result is of this request, this model and these options.
    pub hash: Hash,
}

impl Numbered {
    /// The prompt's tokens.
    pub fn encode(&self, text: Option<&Text>) -> anyhow::Result<Vec<u32>> {
        // It was checked that there is what is needed.
        Ok(match (&self.prompt, text) {
            (Prompt::Tokens(tokens), _) => tokens.clone(),
            (Prompt::Text(prompt), Some(text)) => text.encode(prompt, true)?,
            (Prompt::Chat(messages), Some(text)) => text.encode_chat(messages, &ChatOptions::default())?,
            (_, None) => anyhow::bail!("the model has no tokenizer"),
        })
    }
}

/// A file of requests, and what they do not say themselves.
pub struct Requests<'a> {
    path: &'a Path,
    opened: &'a Opened,
    defaults: GenerateOptions,
    /// Tokens that end a text, unless a request goes on past them.
    eos: Vec<u32>,
    /// What all results depend on.
    identity: blake3::Hasher,
}

/// Gives the requests one by one.
pub struct Reader<'a, 'b> {
    requests: &'b Requests<'a>,
    lines: Lines,
    expected: Option<&'b [Option<Hash>]>,
}

impl<'a> Requests<'a> {
    /// The file at `path`, which is not read yet.
    pub fn new(opened: &'a Opened, args: &RunArgs, path: &'a Path) -> anyhow::Result<Self> {
        let defaults = generate::options(&args.sampling, &args.model, opened)?;
        let mut identity = blake3::Hasher::new();
        let mut add = |bytes: &[u8]| {
            identity.update(&(bytes.len() as u64).to_le_bytes()).update(bytes);
        };
        let plan = opened.plan();
        add(plan.model.checkpoint.as_bytes());
        add(moewe_plan::Precision::from(args.model.precision).name().as_bytes());
        for weight in &plan.weights {
            add(weight.format.name().as_bytes());
        }
        for name in TEXT_FILES {
            let file = args.model.path().join(name);
            let bytes = if file.is_file() { fs::read(&file) } else { Ok(Vec::new()) };
            add(&bytes.with_context(|| file.display().to_string())?);
        }
        Ok(Self { path, opened, defaults, eos: eos(opened), identity })
    }

    /// Checks the whole file. Returns for each line its request's hash, if it has a request.
    pub fn check(&self) -> anyhow::Result<Vec<Option<Hash>>> {
        let mut hashes = Vec::new();
        for request in self.reader(None)? {
            let request = request?;
            hashes.resize(request.number as usize - 1, None);
            hashes.push(Some(request.hash));
        }
        Ok(hashes)
    }

    /// The requests, from a file that was checked.
    pub fn read<'b>(&'b self, hashes: &'b [Option<Hash>]) -> anyhow::Result<Reader<'a, 'b>> {
        self.reader(Some(hashes))
    }

    fn reader<'b>(&'b self, expected: Option<&'b [Option<Hash>]>) -> anyhow::Result<Reader<'a, 'b>> {
        let file = File::open(self.path).with_context(|| format!("cannot read {}", self.path.display()))?;
        Ok(Reader { requests: self, lines: Lines::new(file, self.path, MAX_LINE), expected })
    }

    fn parse(&self, number: u64, line: &[u8]) -> Result<Numbered, String> {
        let Fields(fields) = serde_json::from_slice(line).map_err(|error| {
            let error = error.to_string();
            // It knows of one line alone.
            let error = error.replace(" at line 1 column ", " at column ");
            format!("expected a JSON object: {error}")
        })?;
        let mut prompts = Vec::new();
        let mut options = self.defaults.clone();
        let (mut id, mut priority, mut stop_tokens) = (Value::Null, 0, Vec::new());
        let Sampling { seed_low, seed_high, .. } = options.sampling;
        let mut seed = u64::from(seed_low) | u64::from(seed_high) << 32;
        for (field, value) in fields {
            let wrong = |expected: &str| format!("field {field:?} is {}, expected {expected}", short(&value));
            let number = |low: f64| {
                let number = value.as_f64().map(|number| number as f32);
                number.filter(|&number| f64::from(number) >= low).ok_or_else(|| wrong("a number"))
            };
            let whole = |least: u64, most: u64| {
                let number = value.as_u64().filter(|number| (least..=most).contains(number));
                number.ok_or_else(|| wrong(&format!("a whole number from {least} to {most}")))
            };
            let sampling = &mut options.sampling;
            match field.as_str() {
                "prompt" => prompts.push(self.text(value.as_str().ok_or_else(|| wrong("a text"))?)?),
                "tokens" => {
                    let vocab_size = self.opened.plan().model.vocab_size;
                    let expected = format!("a list of ids from 0 to {}, at least one", vocab_size.saturating_sub(1));
                    let ids = ids(&value).filter(|ids| !ids.is_empty() && ids.iter().all(|&id| id < vocab_size));
                    prompts.push(Prompt::Tokens(ids.ok_or_else(|| wrong(&expected))?));
                }
                "messages" => {
                    let messages = value.as_array().filter(|list| !list.is_empty());
                    prompts.push(self.chat(messages.ok_or_else(|| wrong("a list of messages, at least one"))?)?);
                }
                "id" if value.is_string() || value.is_number() => id = value,
                "id" => return Err(wrong("a text or a number")),
                "max_new_tokens" => options.max_new_tokens = whole(1, u32::MAX.into())? as usize,
                "temperature" => sampling.temperature = number(f64::NEG_INFINITY)?,
                "top_p" => sampling.top_p = number(f64::NEG_INFINITY)?,
                "min_p" => sampling.min_p = number(f64::NEG_INFINITY)?,
                "repetition_penalty" => sampling.repetition_penalty = number(f64::NEG_INFINITY)?,
                "top_k" => sampling.top_k = whole(0, u32::MAX.into())? as u32,
                "seed" => seed = whole(0, u64::MAX)?,
                "stop_token_ids" => stop_tokens = ids(&value).ok_or_else(|| wrong("a list of token ids"))?,
                "ignore_eos" => options.ignore_eos = value.as_bool().ok_or_else(|| wrong("true or false"))?,
                "priority" => {
                    let number = value.as_i64().and_then(|number| i32::try_from(number).ok());
                    priority = number.ok_or_else(|| wrong("a whole number, 0 is usual"))?;
                }
                _ => return Err(format!("unknown field {field:?}; there are {}", FIELDS.join(", "))),
            }
        }
        if let Some((field, value, expected)) = generate::wrong(&options.sampling) {
            return Err(format!("field {field:?} is {value}, expected {expected}"));
        }
        (options.sampling.seed_low, options.sampling.seed_high) = (seed as u32, (seed >> 32) as u32);
        options.stop_tokens = if options.ignore_eos { Vec::new() } else { self.eos.clone() };
        options.stop_tokens.extend(stop_tokens);
        let prompt = match <[Prompt; 1]>::try_from(prompts) {
            Ok([prompt]) => prompt,
            Err(prompts) => {
                let found = if prompts.is_empty() { "none of them" } else { "several" };
                return Err(format!(
                    "expected one of the fields \"prompt\", \"tokens\" and \"messages\", found {found}"
                ));
            }
        };
        let hash = self.hash(&id, &prompt, &options);
        Ok(Numbered { number, id, prompt, options, priority, hash })
    }

    fn text(&self, prompt: &str) -> Result<Prompt, String> {
        match self.opened.text {
            _ if prompt.is_empty() => Err("field \"prompt\" is empty, expected a text".into()),
            None => {
                Err("field \"prompt\": the model has no tokenizer.json, so text cannot be read; give \"tokens\"".into())
            }
            Some(_) => Ok(Prompt::Text(prompt.into())),
        }
    }

    fn chat(&self, messages: &[Value]) -> Result<Prompt, String> {
        if self.opened.text.as_ref().is_none_or(|text| !text.has_chat_template()) {
            return Err("field \"messages\": the model has no tokenizer with a chat template; give \"prompt\" or \
                        \"tokens\""
                .into());
        }
        let message = |message: &Value| {
            let mut more = message.as_object()?.clone();
            let role = more.shift_remove("role")?.as_str()?.to_owned();
            let content = match more.shift_remove("content") {
                None | Some(Value::Null) => None,
                Some(Value::String(text)) => Some(text),
                Some(_) => return None,
            };
            Some(Message { role, content, more })
        };
        let read = |value: &Value| {
            let expected = "objects with \"role\" (text) and \"content\" (text)";
            message(value).ok_or_else(|| format!("field \"messages\" has {}, expected {expected}", short(value)))
        };
        Ok(Prompt::Chat(messages.iter().map(read).collect::<Result<_, _>>()?))
    }

    fn hash(&self, id: &Value, prompt: &Prompt, options: &GenerateOptions) -> Hash {
        let prompt = match prompt {
            Prompt::Text(text) => json!({ "prompt": text }),
            Prompt::Tokens(tokens) => json!({ "tokens": tokens }),
            Prompt::Chat(messages) => json!({ "messages": messages }),
        };
        let Sampling { temperature, top_p, min_p, repetition_penalty, top_k, seed_low, seed_high, constraints: _ } =
            options.sampling;
        let numbers = [temperature, top_p, min_p, repetition_penalty].map(f32::to_bits);
        let all = json!([
            id,
            prompt,
            numbers,
            [top_k, seed_low, seed_high],
            options.max_new_tokens,
            options.stop_tokens,
            options.ignore_eos
        ]);
        let mut hasher = self.identity.clone();
        hasher.update(all.to_string().as_bytes());
        let hash = hasher.finalize();
        u64::from_be_bytes(*hash.as_bytes().first_chunk().expect("a hash has 32 bytes"))
    }
}

impl Iterator for Reader<'_, '_> {
    type Item = anyhow::Result<Numbered>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Err(error) = interrupt::check() {
                return Some(Err(error));
            }
            let line = match self.lines.next() {
                Ok(line) => line?,
                Err(error) => return Some(Err(error)),
            };
            if line.bytes.trim_ascii().is_empty() {
                continue;
            }
            let place = || format!("{}:{}", self.requests.path.display(), line.number);
            let request = match self.requests.parse(line.number, line.bytes) {
                Ok(request) => request,
                Err(what) => return Some(Err(anyhow::anyhow!("{}: {what}", place()))),
            };
            let is_other = |hashes: &[Option<Hash>]| {
                hashes.get(request.number as usize - 1).copied().flatten() != Some(request.hash)
            };
            if self.expected.is_some_and(is_other) {
                return Some(Err(anyhow::anyhow!("{}: the file was changed while it was served", place())));
            }
            return Some(Ok(request));
        }
    }
}

/// The fields of an object, each of them once.
struct Fields(Vec<(String, Value)>);

impl<'de> Deserialize<'de> for Fields {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Read;
        impl<'de> Visitor<'de> for Read {
            type Value = Fields;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields, A::Error> {
                let mut fields: Vec<(String, Value)> = Vec::new();
                while let Some((name, value)) = map.next_entry::<String, Value>()? {
                    if fields.iter().any(|(other, _)| *other == name) {
                        return Err(serde::de::Error::custom(format!("field {name:?} is there twice")));
                    }
                    fields.push((name, value));
                }
                Ok(Fields(fields))
            }
        }
        deserializer.deserialize_map(Read)
    }
}

fn ids(value: &Value) -> Option<Vec<u32>> {
    value.as_array()?.iter().map(|id| id.as_u64()?.try_into().ok()).collect()
}

/// The beginning of a value, for messages.
fn short(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}
