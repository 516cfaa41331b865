//! `tokenizer.json` and `tokenizer_config.json`.
//!
//! The crate `tokenizers` does the work. This module narrows it to what DeepSeek-family models have, byte-level BPE, so
//! that every token is a fixed string of bytes, and takes away what a file could use to change a prompt behind the
//! user's back (truncation, padding, dropout).

use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;
use serde_json::error::Category;
use tokenizers::{
    DecoderWrapper, Model as _, ModelWrapper, OffsetReferential, OffsetType, PostProcessorWrapper, PreTokenizedString,
    PreTokenizer as _, Tokenizer,
};

use super::TextError;
use super::source::{self, JsonFile};

/// DeepSeek-V3's tokenizer.json has 7.8 MB, the largest public ones some 35 MB.
const TOKENIZER_LIMIT: u64 = 256 << 20;
/// A tokenizer_config.json lists each added token and may hold several chat templates.
const CONFIG_LIMIT: u64 = 16 << 20;

/// The ids of the special tokens that `tokenizer_config.json` names.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SpecialIds {
    /// Begin of sequence.
    pub bos: Option<u32>,
    /// End of sequence.
    pub eos: Option<u32>,
    /// Padding.
    pub pad: Option<u32>,
    /// Unknown token.
    pub unk: Option<u32>,
}

/// A token beside the model's own vocabulary, found in a text before that is taken to pieces.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AddedToken {
    /// Its id.
    pub id: u32,
    /// How it is written.
    pub content: String,
    /// Whether the tokenizer leaves it out of texts where special tokens are.
    pub special: bool,
}

/// `tokenizer_config.json`, or its defaults where there is none.
#[derive(Default)]
pub struct Config {
    json: Option<JsonFile>,
    /// The fields `bos_token`, `eos_token`, … that are set, with the token's text.
    pub special_tokens: Vec<(&'static str, String)>,
    add_bos: Option<bool>,
    add_eos: Option<bool>,
}

/// The fields of `tokenizer_config.json` that name a special token.
const SPECIAL_FIELDS: [&str; 4] = ["bos_token", "eos_token", "pad_token", "unk_token"];

impl Config {
    pub fn load(dir: &Path) -> Result<Self, TextError> {
        let Some(json) = JsonFile::load(&dir.join("tokenizer_config.json"), CONFIG_LIMIT)? else {
            return Ok(Self::default());
        };
        let mut special_tokens = Vec::new();
        for field in SPECIAL_FIELDS {
            // Either the text itself or an added token's description with the field `content`.
            let token = json.parse(field, "a string or an object with the string `content`", |value| {
                value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_owned)
            })?;
            special_tokens.extend(token.map(|token| (field, token)));
        }
        let add_bos = json.parse("add_bos_token", "true or false", Value::as_bool)?;
        let add_eos = json.parse("add_eos_token", "true or false", Value::as_bool)?;
        Ok(Self { json: Some(json), special_tokens, add_bos, add_eos })
    }

    /// The file, if there is one.
    pub fn json(&self) -> Option<&JsonFile> {
        self.json.as_ref()
    }

    fn special_token(&self, field: &str) -> Option<&str> {
        self.special_tokens.iter().find(|(name, _)| *name == field).map(|(_, token)| token.as_str())
    }

    fn class(&self) -> &str {
        self.json.as_ref().and_then(|json| json.get("tokenizer_class")).and_then(Value::as_str).unwrap_or_default()
    }
}

/// A byte-level BPE tokenizer with its special tokens.
#[derive(Debug)]
pub struct ModelTokenizer {
    tokenizer: Tokenizer,
    special: SpecialIds,
    /// What goes before and after a text that is a whole sequence.
    prefix: Option<u32>,
    suffix: Option<u32>,
    max_id: u32,
    byte_of_char: Vec<Option<u8>>,
}

impl ModelTokenizer {
    /// Loads `tokenizer.json`; `None` if there is no such file.
    pub fn load(dir: &Path, config: &Config) -> Result<Option<Self>, TextError> {
        let file = dir.join("tokenizer.json");
        let Some(text) = source::read_text(&file, TOKENIZER_LIMIT)? else { return Ok(None) };
        check_outline(&text, &file)?;
        let mut tokenizer: Tokenizer = text
            .parse()
            .map_err(|e: tokenizers::Error| TextError::Tokenizer { file: file.clone(), detail: e.to_string() })?;
        narrow(&mut tokenizer, &file)?;

        let id = |field: &'static str| match config.special_token(field) {
            None => Ok(None),
            Some(token) => tokenizer.token_to_id(token).map(Some).ok_or_else(|| TextError::UnknownToken {
                file: dir.join("tokenizer_config.json"),
                field,
                token: token.to_owned(),
            }),
        };
        let special =
            SpecialIds { bos: id("bos_token")?, eos: id("eos_token")?, pad: id("pad_token")?, unk: id("unk_token")? };
        let (mut prefix, mut suffix) = added_by_file(&tokenizer, &file)?;
        // The Llama classes add a begin token unless told otherwise; any other class does what the file says.
        let llama = config.class().starts_with("LlamaTokenizer");
        if let Some(add) = config.add_bos.or(llama.then_some(true)) {
            prefix = wanted(add, special.bos, config, "add_bos_token", "a `bos_token` beside it")?;
        }
        if let Some(add) = config.add_eos.or(llama.then_some(false)) {
            suffix = wanted(add, special.eos, config, "add_eos_token", "an `eos_token` beside it")?;
        }
        let max_id = tokenizer.get_vocab(true).into_values().max().unwrap_or(0);
        Ok(Some(Self { tokenizer, special, prefix, suffix, max_id, byte_of_char: byte_of_char() }))
    }

    pub fn encode(&self, text: &str, whole: bool) -> Result<Vec<u32>, TextError> {
        let encoding =
            self.tokenizer.encode_fast(text, false).map_err(|e| TextError::Encode { detail: e.to_string() })?;
        let body = encoding.get_ids();
        let mut ids = Vec::with_capacity(body.len() + 2);
        if whole {
            ids.extend(self.prefix.filter(|&bos| body.first() != Some(&bos)));
        }
        ids.extend_from_slice(body);
        if whole {
            ids.extend(self.suffix);
        }
        Ok(ids)
    }

    /// The ids of a text some of whose characters are hidden: `shown` gives each character's true form. Added tokens are
    /// found in the text as it is, all else is tokenized in its true form. Nothing goes before or after it.
    pub fn encode_hidden(&self, text: &str, shown: impl Fn(char) -> char) -> Result<Vec<u32>, TextError> {
        let failed = |e: tokenizers::Error| TextError::Encode { detail: e.to_string() };
        let added = self.tokenizer.get_added_vocabulary();
        let parts = added.extract_and_normalize(self.tokenizer.get_normalizer(), text);
        let mut ids = Vec::new();
        for (part, _, tokens) in parts.get_splits(OffsetReferential::Normalized, OffsetType::None) {
            if let Some(tokens) = tokens {
                ids.extend(tokens.iter().map(|token| token.id));
                continue;
            }
            let mut words = PreTokenizedString::from(part.chars().map(&shown).collect::<String>());
            if let Some(pre_tokenizer) = self.tokenizer.get_pre_tokenizer() {
                pre_tokenizer.pre_tokenize(&mut words).map_err(failed)?;
            }
            self.tokenizer.get_model().tokenize_in_pretokenized(&mut words, None).map_err(failed)?;
            let words = words.get_splits(OffsetReferential::Normalized, OffsetType::None);
            ids.extend(words.into_iter().filter_map(|(_, _, tokens)| tokens.as_ref()).flatten().map(|token| token.id));
        }
        Ok(ids)
    }

    /// The tokens beside the model's own vocabulary.
    pub fn added(&self) -> Vec<AddedToken> {
        let tokens = self.tokenizer.get_added_vocabulary().get_added_tokens_decoder();
        let token = |(&id, token): (&u32, &tokenizers::AddedToken)| AddedToken {
            id,
            content: token.content.clone(),
            special: token.special,
        };
        let mut tokens: Vec<_> = tokens.iter().map(token).collect();
        tokens.sort_unstable_by_key(|token| token.id);
        tokens
    }

    /// The token that goes before a text that is a whole sequence.
    pub fn begin(&self) -> Option<u32> {
        self.prefix
    }

    /// The bytes that a token stands for; `None` for an unknown id.
    pub fn bytes(&self, id: u32) -> Option<Vec<u8>> {
        let token = self.token(id)?;
        // A token written in the byte alphabet stands for those bytes, any other (an added one) for itself.
        let bytes: Option<Vec<u8>> =
            token.chars().map(|c| self.byte_of_char.get(c as usize).copied().flatten()).collect();
        Some(bytes.unwrap_or_else(|| token.into_bytes()))
    }

    /// Whether a token is left out of the text where special tokens are.
    pub fn is_special(&self, id: u32) -> bool {
        self.token(id).is_some_and(|token| self.tokenizer.get_added_vocabulary().is_special_token(&token))
    }

    /// Whether a token is one of `added_tokens`.
    pub fn is_added(&self, id: u32) -> bool {
        self.tokenizer.get_added_vocabulary().simple_id_to_token(id).is_some()
    }

    fn token(&self, id: u32) -> Option<String> {
        let added = self.tokenizer.get_added_vocabulary().simple_id_to_token(id);
        added.or_else(|| self.tokenizer.get_model().id_to_token(id))
    }

    pub fn vocab_size(&self) -> usize {
        self.tokenizer.get_vocab_size(true)
    }

    pub fn max_id(&self) -> u32 {
        self.max_id
    }

    pub fn special_ids(&self) -> &SpecialIds {
        &self.special
    }
}

/// The parts of `tokenizer.json` to look at before the crate `tokenizers` does.
#[derive(Deserialize)]
#[serde(expecting = "an object")]
struct Outline {
    #[serde(default)]
    model: OutlineModel,
    #[serde(default)]
    normalizer: Value,
    // Parsed for their own sake: the crate panics where these are not JSON.
    #[serde(default, rename = "pre_tokenizer")]
    _pre_tokenizer: Value,
    #[serde(default, rename = "post_processor")]
    _post_processor: Value,
    #[serde(default, rename = "decoder")]
    _decoder: Value,
}

#[derive(Deserialize, Default)]
#[serde(expecting = "an object as `model`")]
struct OutlineModel {
    #[serde(default)]
    dropout: Value,
    #[serde(default)]
    continuing_subword_prefix: Value,
    #[serde(default)]
    end_of_word_suffix: Value,
}

/// Refuses what the crate `tokenizers` would panic on, and what no byte-level BPE has.
fn check_outline(text: &str, file: &Path) -> Result<(), TextError> {
    let outline: Outline = serde_json::from_str(text).map_err(|e| match e.classify() {
        Category::Data => TextError::Tokenizer { file: file.to_owned(), detail: e.to_string() },
        _ => TextError::Json { file: file.to_owned(), source: e },
    })?;
    if has_type(&outline.normalizer, "Precompiled") {
        let (found, expected) = ("Precompiled".to_owned(), "a plain one");
        return Err(TextError::Unsupported { file: file.to_owned(), part: "the normalizer", found, expected });
    }
    let model = outline.model;
    for (part, value) in [
        ("the model's `dropout`", model.dropout),
        ("the model's `continuing_subword_prefix`", model.continuing_subword_prefix),
        ("the model's `end_of_word_suffix`", model.end_of_word_suffix),
    ] {
        let nothing = match &value {
            Value::Null => true,
            Value::Number(number) => number.as_f64() == Some(0.0),
            Value::String(text) => text.is_empty(),
            _ => false,
        };
        if !nothing {
            let found = source::shorten(&value);
            return Err(TextError::Unsupported { file: file.to_owned(), part, found, expected: "null" });
        }
    }
    Ok(())
}

/// Whether an object of this `type` is anywhere in a value.
fn has_type(value: &Value, name: &str) -> bool {
    match value {
        Value::Array(list) => list.iter().any(|value| has_type(value, name)),
        Value::Object(map) => {
            map.get("type").is_some_and(|found| found == name) || map.values().any(|value| has_type(value, name))
        }
        _ => false,
    }
}

/// Refuses tokenizers other than byte-level BPE and switches off what would change a prompt.
fn narrow(tokenizer: &mut Tokenizer, file: &Path) -> Result<(), TextError> {
    let unsupported =
        |part, found: String, expected| TextError::Unsupported { file: file.to_owned(), part, found, expected };
    let ModelWrapper::BPE(_) = tokenizer.get_model() else {
        let found = kind(&format!("{:?}", tokenizer.get_model()));
        return Err(unsupported("the model", found, "BPE"));
    };
    match tokenizer.get_decoder() {
        Some(DecoderWrapper::ByteLevel(_)) => {}
        other => {
            let found = other.map_or("null".to_owned(), |decoder| kind(&format!("{decoder:?}")));
            return Err(unsupported("the decoder", found, "ByteLevel"));
        }
    }
    tokenizer.with_padding(None);
    tokenizer
        .with_truncation(None)
        .map_err(|e| TextError::Tokenizer { file: file.to_owned(), detail: e.to_string() })?;
    Ok(())
}

/// The name of an enum's variant out of its debug form.
fn kind(debug: &str) -> String {
    debug.chars().take_while(|c| c.is_alphanumeric()).collect()
}

/// The one token that the file's own post-processor would put before and after a text.
fn added_by_file(tokenizer: &Tokenizer, file: &Path) -> Result<(Option<u32>, Option<u32>), TextError> {
    if matches!(tokenizer.get_post_processor(), None | Some(PostProcessorWrapper::ByteLevel(_))) {
        return Ok((None, None));
    }
    // A letter as the text: what stands around its tokens is what the post-processor added.
    let encode = |special| {
        let encoding = tokenizer.encode_fast("a", special);
        encoding.map_err(|e| TextError::Tokenizer { file: file.to_owned(), detail: e.to_string() })
    };
    let (bare, full) = (encode(false)?, encode(true)?);
    let (bare, full) = (bare.get_ids(), full.get_ids());
    let begin = full.windows(bare.len().max(1)).position(|window| window == bare);
    let around = begin.map(|at| (&full[..at], &full[at + bare.len()..]));
    match around {
        Some((before, after)) if before.len() <= 1 && after.len() <= 1 => {
            Ok((before.first().copied(), after.first().copied()))
        }
        _ => Err(TextError::Unsupported {
            file: file.to_owned(),
            part: "the post-processor",
            found: format!("one that turns the tokens {bare:?} into {full:?}"),
            expected: "one that adds at most one token before and one after",
        }),
    }
}

/// The token to add if `field` says so; it must then be named.
fn wanted(
    add: bool,
    id: Option<u32>,
    config: &Config,
    field: &'static str,
    expected: &'static str,
) -> Result<Option<u32>, TextError> {
    match (add, id, config.json()) {
        (false, _, _) => Ok(None),
        (true, None, Some(json)) if json.get(field).is_some() => Err(json.wrong(field, &Value::Bool(true), expected)),
        (true, id, _) => Ok(id),
    }
}

/// The byte-level alphabet of GPT-2 backwards: printable Latin-1 characters stand for themselves, the other 68 bytes for
/// U+0100 upwards, in order.
fn byte_of_char() -> Vec<Option<u8>> {
    let mut table = vec![None; 0x100 + 68];
    let mut next = 0x100;
    for byte in 0..=u8::MAX {
        let printable = matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
        let char = if printable { usize::from(byte) } else { next };
        next += usize::from(!printable);
        table[char] = Some(byte);
    }
    table
}

impl std::fmt::Debug for Config {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let file: Option<PathBuf> = self.json.as_ref().map(|json| json.path().to_owned());
        f.debug_struct("Config")
            .field("file", &file)
            .field("special_tokens", &self.special_tokens)
            .finish_non_exhaustive()
    }
}
