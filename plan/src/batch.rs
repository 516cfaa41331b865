//! Layout of the buffers through which the host hands a batch to a program. All are little-endian 32-bit words.

/// Tokens in a page of the latent cache.
pub const PAGE_TOKENS: u32 = 64;

/// Decode steps that the buffer of finished tokens holds before the host must read it.
pub const FINISHED_STEPS: u32 = 32;

/// Most tokens that are drafted behind a token before all of them are verified in one pass.
pub const MAX_DRAFTS: u32 = 7;

/// Most modules of multi-token prediction that can draft.
pub const MAX_DRAFT_MODULES: u32 = 8;

/// Words of a group in the buffer of drafts ([`crate::Role::Drafts`]): the position of its newest token, the ids of its
/// newest `mtp_modules` tokens (the newest last), then the drafts behind it.
pub const DRAFT_WORDS: u32 = 16;

/// Stands in the ring of finished tokens where a draft was rejected, so that there is no token.
pub const REJECTED: u32 = u32::MAX;

/// Stands in the ring of finished tokens where no logit was a number above −∞, so that nothing could be drawn.
pub const POISONED: u32 = u32::MAX - 1;

/// Tokens whose log probabilities are told beside that of the token that was drawn ([`crate::Role::Logprobs`]).
pub const LOGPROB_TOP: u32 = 20;

/// Words of a row in the ring of log probabilities ([`crate::Role::Logprobs`]): that of the drawn token (f32; NaN if there
/// is none), 0, the ids of the [`LOGPROB_TOP`] likeliest tokens, best first (`u32::MAX` where the vocabulary has no more),
/// then their log probabilities (f32).
pub const LOGPROB_WORDS: u32 = 2 + 2 * LOGPROB_TOP;

/// Bit of [`Sampling::constraints`]: only tokens of the sequence's mask ([`crate::Role::Mask`]) may be drawn.
pub const MASKED: u32 = 1;

/// Bit of [`Sampling::constraints`]: the sequence's bias ([`crate::Role::Bias`]) is added to the logits.
pub const BIASED: u32 = 2;

/// Uniform `batch` of every kernel that looks at the batch ([`crate::Role::Header`]), 32 bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Header {
    /// Tokens in the batch.
    pub tokens: u32,
    /// Rows whose logits are wanted.
    pub rows: u32,
    /// Groups of the main model's batch ([`Group`]).
    pub groups: u32,
    /// 0 in a pass of the main model; n in the pass of a module of multi-token prediction that makes the n-th draft.
    pub stage: u32,
    /// Drafts that are made behind a pass of the main model, at most [`MAX_DRAFTS`]; 0 if none are.
    pub drafts: u32,
    /// Groups that take part in drafting: the first ones. Those of them with wanted rows come before those without.
    pub drafting: u32,
    /// Zero.
    pub reserved: [u32; 2],
}

/// The tokens of one sequence in a batch of the main model ([`crate::Role::Groups`]), 32 bytes. They are consecutive, at
/// consecutive positions. If rows are wanted, they are those of the last tokens: of the newest token, and of the drafts
/// behind it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Group {
    /// Index of its first token in the batch.
    pub first_token: u32,
    /// Its tokens.
    pub tokens: u32,
    /// Index of its first wanted row.
    pub first_row: u32,
    /// Its wanted rows: none, or one for the newest token and one for each draft.
    pub rows: u32,
    /// Slot of the sequence.
    pub sequence: u32,
    /// The last position for which the sequence has a page.
    pub limit: u32,
    /// Zero.
    pub reserved: [u32; 2],
}

impl Header {
    /// As the device reads it.
    pub fn words(&self) -> [u32; 8] {
        let Self { tokens, rows, groups, stage, drafts, drafting, reserved: [a, b] } = *self;
        [tokens, rows, groups, stage, drafts, drafting, a, b]
    }
}

impl Group {
    /// As the device reads it.
    pub fn words(&self) -> [u32; 8] {
        let Self { first_token, tokens, first_row, rows, sequence, limit, reserved: [a, b] } = *self;
        [first_token, tokens, first_row, rows, sequence, limit, a, b]
    }
}

/// One token of the batch ([`crate::Role::Tokens`]), 16 bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct TokenInfo {
    /// Token id.
    pub id: u32,
    /// Position in its sequence, from 0.
    pub position: u32,
    /// Slot of its sequence: the row of the page table and of the sampling parameters.
    pub sequence: u32,
    /// The token behind it plus one, or 0 where it is not known: the sampled token follows then.
    pub next: u32,
}

/// How the next token of a sequence is drawn ([`crate::Role::Sampling`]), 32 bytes.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C)]
pub struct Sampling {
    /// Logits are divided by it; 0 takes the largest logit.
    pub temperature: f32,
    /// Keep the smallest set of most likely tokens whose probability reaches this; 1 keeps all.
    pub top_p: f32,
    /// Drop tokens less likely than this times the most likely one; 0 keeps all.
    pub min_p: f32,
    /// Positive logits of tokens seen before are divided by it, negative ones multiplied; 1 changes nothing.
    pub repetition_penalty: f32,
    /// Keep this many most likely tokens; 0 keeps all.
    pub top_k: u32,
    /// Low half of the seed.
    pub seed_low: u32,
    /// High half of the seed.
    pub seed_high: u32,
    /// [`MASKED`] and [`BIASED`]. A session sets these bits itself, whatever callers say here.
    pub constraints: u32,
}

impl Default for Sampling {
    /// Greedy.
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            top_k: 0,
            seed_low: 0,
            seed_high: 0,
            constraints: 0,
        }
    }
}
