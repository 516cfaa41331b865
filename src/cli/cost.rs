//! What a step of a program moves and computes, for `explain` and `bench`.

use moewe_plan::{Cost, Dim, Step, Symbol};

/// The batch of one run, as far as costs depend on it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Tokens.
    pub tokens: u64,
    /// Rows whose logits are wanted.
    pub rows: u64,
    /// Positions of the latent cache that are read, each as often as is counted.
    pub cached: u64,
    /// Positions that each token attends to, over all tokens.
    pub attended: u64,
}

/// Bytes and floating-point operations of a step.
pub fn cost(step: &Step, load: &Load) -> (u64, u64) {
    let Cost { fixed_bytes, token_bytes, token_flops, context_bytes, context_flops } = step.cost;
    // What is done once for all of a batch, such as accepting tokens, is about its wanted rows.
    let counts_tokens = step.grid.iter().any(|dim| {
        matches!(
            dim,
            Dim::Symbol(Symbol::Tokens)
                | Dim::Times(Symbol::Tokens, _)
                | Dim::CeilDiv(Symbol::Tokens, _)
                | Dim::Tiles { of: Symbol::Tokens, .. }
        )
    });
    let times = if counts_tokens { load.tokens } else { load.rows };
    let bytes = fixed_bytes + times * token_bytes + load.cached * context_bytes;
    (bytes, times * token_flops + load.attended * context_flops)
}
