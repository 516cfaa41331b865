//! A model's vocabulary as grammars need it: the bytes of each token, arranged as a trie.

use std::sync::{Arc, OnceLock};

use toktrie::{INVALID_TOKEN, TokRxInfo, TokTrie, TokenizerEnv};

use super::GrammarError;
use crate::text::Text;

/// Longer tokens are never allowed under a grammar: the trie has room for 1,024 bytes of depth.
const LONGEST_TOKEN: usize = 1000;
/// The trie numbers tokens with 24 bits, the last of which means none.
const MOST_TOKENS: u32 = (1 << 24) - 2;

/// Turns a text into the tokens that the model would read it as.
type Encode = dyn Fn(&str) -> Option<Vec<u32>> + Send + Sync;

/// What a token is to a grammar.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Token {
    /// Bytes of text.
    Text(Vec<u8>),
    /// A control token of this spelling. A grammar names it or does not get it: text that is spelt alike is another
    /// matter.
    Control(Vec<u8>),
    /// A padding id, which is never allowed.
    Unknown,
}

/// The tokens of a model.
pub(super) struct Vocabulary {
    trie: TokTrie,
    eos: Vec<u32>,
    encode: Box<Encode>,
    /// All tokens but the unknown and those that end a text, as a mask.
    free: OnceLock<Vec<u32>>,
}

impl Vocabulary {
    /// Takes the tokens of `text`. Ids from `vocab_size` on do not exist for the model, and those that the tokenizer
    /// does not know are never allowed. The tokens of `eos` end a text.
    pub fn of_text(text: &Arc<Text>, vocab_size: u32, eos: &[u32]) -> Result<Self, GrammarError> {
        let token = |id| match text.bytes(id) {
            None => Token::Unknown,
            Some(bytes) if text.is_added(id) => Token::Control(bytes),
            Some(bytes) => Token::Text(bytes),
        };
        let tokenizer = Arc::clone(text);
        Self::new(vocab_size, token, eos, move |text| tokenizer.encode(text, false).ok())
    }

    /// Arranges `vocab_size` tokens. `encode` is asked for the tokens of texts that a grammar prescribes.
    pub fn new(
        vocab_size: u32,
        token: impl Fn(u32) -> Token,
        eos: &[u32],
        encode: impl Fn(&str) -> Option<Vec<u32>> + Send + Sync + 'static,
    ) -> Result<Self, GrammarError> {
        if vocab_size == 0 || vocab_size > MOST_TOKENS {
            let reason = format!("it has {vocab_size} tokens, expected 1 to {MOST_TOKENS}");
            return Err(GrammarError::Vocabulary { reason });
        }
        if let Some(id) = eos.iter().find(|&&id| id >= vocab_size) {
            let reason = format!("the end-of-sequence token {id} is not below its size, {vocab_size}");
            return Err(GrammarError::Vocabulary { reason });
        }
        let words: Vec<Vec<u8>> = (0..vocab_size).map(|id| word(token(id), eos.contains(&id))).collect();
        let info = TokRxInfo::new(vocab_size, eos.first().copied().unwrap_or(INVALID_TOKEN));
        // The trie counts its nodes with 22 bits, which only a made-up vocabulary exceeds. It says so by a panic.
        let trie = llguidance::panic_utils::catch_unwind(|| {
            let trie = TokTrie::from(&info, &words);
            Ok(if eos.is_empty() { trie } else { trie.with_eos_tokens(eos) })
        });
        let trie = trie.map_err(|error| GrammarError::Vocabulary { reason: super::reason(&error.to_string()) })?;
        Ok(Self { trie, eos: eos.to_vec(), encode: Box::new(encode), free: OnceLock::new() })
    }

    /// The number of tokens, unknown ones included.
    pub fn len(&self) -> u32 {
        self.trie.vocab_size() as u32
    }

    /// The tokens that end a text.
    pub fn eos(&self) -> &[u32] {
        &self.eos
    }

    /// The bytes of a token as they stand in a text, a control token's spelling included; empty for an unknown one.
    pub fn spelling(&self, id: u32) -> &[u8] {
        let word = self.trie.token(id);
        word.strip_prefix(&[TokTrie::SPECIAL_TOKEN_MARKER]).unwrap_or(word)
    }

    /// The control token of this spelling.
    pub fn control(&self, spelling: &str) -> Option<u32> {
        self.trie.get_special_token(spelling)
    }

    /// All tokens that a text may have which is not held to anything, bar those that end it: a bit each, words of 32.
    pub fn free(&self) -> &[u32] {
        self.free.get_or_init(|| {
            let mut mask = vec![0; self.len().div_ceil(32) as usize];
            for id in (0..self.len()).filter(|id| !self.trie.token(*id).is_empty() && !self.eos.contains(id)) {
                mask[id as usize / 32] |= 1 << (id % 32);
            }
            mask
        })
    }

    fn encode_exactly(&self, text: &str) -> Vec<u32> {
        // A normalizer may have changed the text, and spelt-out control tokens may have become control tokens.
        let exact = |ids: &Vec<u32>| ids.iter().flat_map(|id| self.trie.token(*id)).eq(text.as_bytes());
        (self.encode)(text).filter(exact).unwrap_or_else(|| self.trie.greedy_tokenize(text.as_bytes()))
    }
}

/// A token's bytes in the trie: control tokens stand behind 0xFF, which is no byte of UTF-8 text.
fn word(token: Token, ends: bool) -> Vec<u8> {
    const MARKER: u8 = TokTrie::SPECIAL_TOKEN_MARKER;
    let control = |spelling: Vec<u8>| [vec![MARKER], spelling].concat();
    match token {
        Token::Text(bytes) | Token::Control(bytes) if ends => control(bytes),
        Token::Unknown if ends => control(b"<end>".to_vec()),
        Token::Control(spelling) if spelling.len() < LONGEST_TOKEN => control(spelling),
        Token::Text(bytes) if bytes.len() <= LONGEST_TOKEN && !bytes.contains(&MARKER) => bytes,
        _ => Vec::new(),
    }
}

impl TokenizerEnv for Vocabulary {
    fn tok_trie(&self) -> &TokTrie {
        &self.trie
    }

    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<u32> {
        self.trie.tokenize_with_greedy_fallback(bytes, |text| self.encode_exactly(text))
    }
}

impl std::fmt::Debug for Vocabulary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vocabulary").field("len", &self.len()).field("eos", &self.eos).finish_non_exhaustive()
    }
}
