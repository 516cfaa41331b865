//! What the user looks at. All views share one selection.

use serde::{Deserialize, Serialize};

/// The selected token, layer, expert and head.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Selection {
    /// Number of the text.
    pub sequence: u32,
    /// Position of the token in it; without one, views show the whole text.
    pub token: Option<u32>,
    /// The layer.
    pub layer: u32,
    /// The expert; without one, views show all.
    pub expert: Option<u32>,
    /// The attention head.
    pub head: u32,
    /// Another text to compare with.
    pub other: Option<u32>,
}
