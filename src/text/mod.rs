//! Text around a model: tokenizer, chat template, streaming decoder and generation defaults.
//!
//! A checkpoint directory in the Hugging Face layout, or a bundle that carries the same files, describes its text
//! in up to five files:
//!
//! | file | what is read from it |
//! |---|---|
//! | `tokenizer.json` | vocabulary, merges, pre-tokenizer, added tokens |
//! | `tokenizer_config.json` | `add_bos_token`, `add_eos_token`, names of the special tokens, `chat_template` |
//! | `chat_template.jinja`, `chat_template.json` | the chat template; each goes before the one in `tokenizer_config.json` |
//! | `generation_config.json` | sampling defaults and end-of-sequence ids |
//!
//! All of them are optional. Without `tokenizer.json` a model still runs on token ids, so [`Text::load`] then gives
//! `None`; the generation defaults stand on their own in [`GenerationDefaults::load`].
//!
//! The files come from strangers. Each is bounded in size and read only if it is a plain file, each parser reports
//! file, field, what was found and what was expected, and a template runs with a limited number of steps and a
//! limited output.

mod generation;
mod source;
mod stream;
mod template;
mod tokenizer;

use std::path::{Path, PathBuf};

pub use generation::GenerationDefaults;
pub use stream::TokenStream;
pub use template::{ChatOptions, Message};
pub use tokenizer::{AddedToken, SpecialIds};

/// The names of the files that this module reads from a checkpoint or bundle directory.
pub const TEXT_FILES: [&str; 5] =
    ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "chat_template.json", "generation_config.json"];

/// What may go wrong between text and tokens.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TextError {
    /// A file is there but cannot be read.
    #[error("cannot read {}: {source}", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// The reason the operating system gave.
        source: std::io::Error,
    },
    /// A path names a directory, a pipe or a device.
    #[error("{} is not a plain file; replace it by the file of that name from the model's publisher", file.display())]
    NotAFile {
        /// The path.
        file: PathBuf,
    },
    /// A file is larger than anything of its kind should be.
    #[error("{} holds {found} bytes, more than the {limit} allowed for such a file; it is probably another file under this name", file.display())]
    TooLarge {
        /// The file.
        file: PathBuf,
        /// Its size in bytes.
        found: u64,
        /// The limit in bytes.
        limit: u64,
    },
    /// A file that should hold UTF-8 text does not.
    #[error("{} is not UTF-8 text (first bad byte at offset {offset}); fetch the file again", file.display())]
    NotUtf8 {
        /// The file.
        file: PathBuf,
        /// Where the first bad byte stands.
        offset: usize,
    },
    /// A JSON file cannot be parsed.
    #[error("{} is not valid JSON: {source}; the file looks damaged or cut short, fetch it again", file.display())]
    Json {
        /// The file.
        file: PathBuf,
        /// What the parser found, with line and column.
        source: serde_json::Error,
    },
    /// A field has a value that it must not have.
    #[error("{}: field `{field}` is {found}, expected {expected}", file.display())]
    Field {
        /// The file.
        file: PathBuf,
        /// The field's name.
        field: String,
        /// The value found, shortened.
        found: String,
        /// What it should have been.
        expected: &'static str,
    },
    /// A special token named by the configuration is not in the vocabulary.
    #[error("{}: `{field}` names the token {token:?}, which tokenizer.json does not have; the two files belong to different models", file.display())]
    UnknownToken {
        /// The file that names the token.
        file: PathBuf,
        /// The field that names it.
        field: &'static str,
        /// The token.
        token: String,
    },
    /// `tokenizer.json` does not describe a tokenizer.
    #[error("{} is not a usable tokenizer: {detail}; fetch the file again", file.display())]
    Tokenizer {
        /// The file.
        file: PathBuf,
        /// What the tokenizer library says.
        detail: String,
    },
    /// `tokenizer.json` describes a tokenizer of a kind that DeepSeek-family models do not have.
    #[error("{}: {part} is {found}, but only {expected} is supported", file.display())]
    Unsupported {
        /// The file.
        file: PathBuf,
        /// The part of the tokenizer.
        part: &'static str,
        /// Its kind.
        found: String,
        /// The kind that works.
        expected: &'static str,
    },
    /// The text cannot be turned into tokens.
    #[error("cannot tokenize the text: {detail}")]
    Encode {
        /// Why.
        detail: String,
    },
    /// A chat was asked for and the model has no chat template.
    #[error("{} has no chat template (neither chat_template.jinja nor `chat_template` in tokenizer_config.json); use plain text instead of a chat", dir.display())]
    NoChatTemplate {
        /// The model directory.
        dir: PathBuf,
    },
    /// The chat template has a syntax error.
    #[error("{}: the chat template cannot be parsed: {detail}", file.display())]
    TemplateSyntax {
        /// The file the template came from.
        file: PathBuf,
        /// The message, with its line in the template.
        detail: String,
    },
    /// The chat template failed on these messages or refused them.
    #[error("{}: the chat template failed: {detail}", file.display())]
    TemplateRender {
        /// The file the template came from.
        file: PathBuf,
        /// The message, with its line in the template.
        detail: String,
    },
    /// The chat template did not come to an end within its limits.
    #[error("{}: the chat template was stopped after {limit}; it loops or is hostile", file.display())]
    TemplateLimit {
        /// The file the template came from.
        file: PathBuf,
        /// The limit that it reached.
        limit: String,
    },
}

/// Everything needed to turn text into tokens and tokens into text for one model.
#[derive(Debug)]
pub struct Text {
    dir: PathBuf,
    tokenizer: tokenizer::ModelTokenizer,
    template: Option<template::ChatTemplate>,
    generation: GenerationDefaults,
}

impl Text {
    /// Loads the text files of a checkpoint or bundle directory, or gives `None` if it has no `tokenizer.json`.
    pub fn load(dir: &Path) -> Result<Option<Self>, TextError> {
        let config = tokenizer::Config::load(dir)?;
        let Some(tokenizer) = tokenizer::ModelTokenizer::load(dir, &config)? else {
            return Ok(None);
        };
        let template = template::ChatTemplate::load(dir, &config)?;
        let generation = GenerationDefaults::load(dir)?;
        Ok(Some(Self { dir: dir.to_owned(), tokenizer, template, generation }))
    }

    /// Turns text into token ids.
    ///
    /// With `add_bos`, the special tokens that `tokenizer_config.json` asks for are added: the begin token if
    /// `add_bos_token` is set (and the text does not spell it out already), the end token if `add_eos_token` is. A model
    /// whose configuration sets neither gets neither. Special tokens spelt out in the text become those tokens.
    pub fn encode(&self, text: &str, add_bos: bool) -> Result<Vec<u32>, TextError> {
        self.tokenizer.encode(text, add_bos)
    }

    /// Turns text into token ids that has characters in place of others: `shown` gives each character's true form. Added
    /// tokens are found in the text as it is, all else is tokenized in its true form, so that what a text only spells
    /// can be kept from becoming a token. No begin or end token is added.
    pub fn encode_hidden(&self, text: &str, shown: impl Fn(char) -> char) -> Result<Vec<u32>, TextError> {
        self.tokenizer.encode_hidden(text, shown)
    }

    /// Turns token ids into text. Ids that the tokenizer does not know, such as the padding of a vocabulary, give no
    /// text; bytes that are no UTF-8 give U+FFFD. With `skip_special`, special tokens give no text either.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let mut stream = self.stream(skip_special);
        let mut text = String::new();
        for &id in ids {
            text += &stream.push(id);
        }
        text + &stream.finish()
    }

    /// Starts an incremental decoder, whose pieces add up to exactly what [`Text::decode`] gives for all ids at once.
    pub fn stream(&self, skip_special: bool) -> TokenStream<'_> {
        TokenStream::new(&self.tokenizer, skip_special)
    }

    /// How a token is written in the vocabulary or, for printing, what it decodes to; `None` for an unknown id.
    pub fn token(&self, id: u32) -> Option<String> {
        let bytes = self.tokenizer.bytes(id)?;
        Some(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// The bytes that a token stands for, those of its spelling for an added token; `None` for an unknown id.
    pub fn bytes(&self, id: u32) -> Option<Vec<u8>> {
        self.tokenizer.bytes(id)
    }

    /// Whether a token was added to the vocabulary by its spelling, as control tokens are.
    pub fn is_added(&self, id: u32) -> bool {
        self.tokenizer.is_added(id)
    }

    /// The number of tokens, added ones included. The model's own vocabulary may be padded to more rows.
    pub fn vocab_size(&self) -> usize {
        self.tokenizer.vocab_size()
    }

    /// The largest token id, which has to be below the model's `vocab_size`.
    pub fn max_id(&self) -> u32 {
        self.tokenizer.max_id()
    }

    /// The tokens beside the model's own vocabulary, by id.
    pub fn added_tokens(&self) -> Vec<AddedToken> {
        self.tokenizer.added()
    }

    /// The token that [`Text::encode`] puts before a text with `add_bos`.
    pub fn begin_id(&self) -> Option<u32> {
        self.tokenizer.begin()
    }

    /// The ids of the special tokens that `tokenizer_config.json` names.
    pub fn special_ids(&self) -> &SpecialIds {
        self.tokenizer.special_ids()
    }

    /// The ids that end a text: those of `generation_config.json` or, where it names none, the tokenizer's end token.
    pub fn eos_ids(&self) -> Vec<u32> {
        match &self.generation.eos_token_ids {
            Some(ids) => ids.clone(),
            None => self.special_ids().eos.into_iter().collect(),
        }
    }

    /// The model's sampling defaults; empty without `generation_config.json`.
    pub fn generation(&self) -> &GenerationDefaults {
        &self.generation
    }

    /// Whether the model has a chat template.
    pub fn has_chat_template(&self) -> bool {
        self.template.is_some()
    }

    /// Whether the source of a chat template has this in it.
    pub fn template_mentions(&self, what: &str) -> bool {
        self.template.as_ref().is_some_and(|template| template.mentions(what))
    }

    /// Writes a conversation as the one string that the model was trained on.
    pub fn render_chat(&self, messages: &[Message], options: &ChatOptions) -> Result<String, TextError> {
        let template = self.template.as_ref().ok_or_else(|| TextError::NoChatTemplate { dir: self.dir.clone() })?;
        template.render(messages, options)
    }

    /// Turns a conversation into token ids. The template writes the begin token itself, so none is added.
    pub fn encode_chat(&self, messages: &[Message], options: &ChatOptions) -> Result<Vec<u32>, TextError> {
        self.encode(&self.render_chat(messages, options)?, false)
    }
}
