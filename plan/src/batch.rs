//! Layout of the buffers through which the host hands a batch to a program. All are little-endian 32-bit words.

/// Tokens in a page of the latent cache.
pub const PAGE_TOKENS: u32 = 64;

/// Decode steps that the buffer of finished tokens holds before the host must read it.
pub const FINISHED_STEPS: u32 = 32;

/// Uniform `batch` of every kernel that looks at the batch ([`crate::Role::Header`]), 16 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Header {
    /// Tokens in the batch.
    pub tokens: u32,
    /// Rows whose logits are wanted.
    pub rows: u32,
    /// Zero.
    pub reserved: [u32; 2],
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
    /// Zero.
    pub reserved: u32,
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
            reserved: 0,
        }
    }
}
