//! Sizes that are known when a program runs, not when it is compiled.

use serde::{Deserialize, Serialize};

/// A quantity of one forward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Symbol {
    /// Tokens in the batch, over all its sequences.
    Tokens,
    /// Rows of the batch whose logits are wanted.
    Rows,
    /// Sequences that the session can hold at once.
    Sequences,
    /// Pages of the latent cache.
    Pages,
}

/// A number that may depend on the batch: a buffer's length or one dimension of a dispatch grid.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Dim {
    /// A constant.
    Const(u64),
    /// A quantity of the batch.
    Symbol(Symbol),
    /// A quantity times a constant.
    Times(Symbol, u64),
    /// A quantity divided by a constant, rounded up.
    CeilDiv(Symbol, u64),
    /// The most tiles that `each` members of every one of a quantity make, sorted into groups whose last tile may be partly
    /// filled.
    Tiles {
        /// The quantity.
        of: Symbol,
        /// Members for each one.
        each: u64,
        /// Members of a full tile.
        size: u64,
        /// Groups.
        groups: u64,
    },
}

/// Values of the symbols.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Symbols {
    /// See [`Symbol::Tokens`].
    pub tokens: u64,
    /// See [`Symbol::Rows`].
    pub rows: u64,
    /// See [`Symbol::Sequences`].
    pub sequences: u64,
    /// See [`Symbol::Pages`].
    pub pages: u64,
}

impl Symbols {
    fn get(&self, symbol: Symbol) -> u64 {
        match symbol {
            Symbol::Tokens => self.tokens,
            Symbol::Rows => self.rows,
            Symbol::Sequences => self.sequences,
            Symbol::Pages => self.pages,
        }
    }
}

impl Dim {
    /// The value under `symbols`; saturates instead of overflowing.
    pub fn eval(&self, symbols: &Symbols) -> u64 {
        match *self {
            Dim::Const(value) => value,
            Dim::Symbol(symbol) => symbols.get(symbol),
            Dim::Times(symbol, factor) => symbols.get(symbol).saturating_mul(factor),
            Dim::CeilDiv(symbol, divisor) => symbols.get(symbol).div_ceil(divisor.max(1)),
            Dim::Tiles { of, each, size, groups } => {
                let (members, size) = (symbols.get(of).saturating_mul(each), size.max(1));
                let missing = groups.min(members).saturating_mul(size - 1);
                (members.saturating_add(missing) / size).min(members)
            }
        }
    }
}

impl std::fmt::Display for Symbol {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Symbol::Tokens => "tokens",
            Symbol::Rows => "rows",
            Symbol::Sequences => "sequences",
            Symbol::Pages => "pages",
        })
    }
}

impl std::fmt::Display for Dim {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Dim::Const(value) => write!(f, "{value}"),
            Dim::Symbol(symbol) => write!(f, "{symbol}"),
            Dim::Times(symbol, factor) => write!(f, "{symbol}·{factor}"),
            Dim::CeilDiv(symbol, divisor) => write!(f, "⌈{symbol}/{divisor}⌉"),
            Dim::Tiles { of, each, size, groups } => write!(f, "tiles({of}·{each}/{size}, {groups})"),
        }
    }
}
