//! The views, one file or folder each.

mod attention;
mod balance;
mod change;
mod choose;
mod compare;
mod depth;
mod expert;
mod latents;
mod mtp;
mod pieces;
mod routing;
mod time;
mod timeline;
mod transcript;

pub use attention::Attention;
pub use balance::BalanceView as Balance;
pub use change::Change;
pub use compare::Compare;
pub use depth::Depth;
pub use expert::ExpertPage as Expert;
pub use latents::LatentsView as Latents;
pub use mtp::Mtp;
pub use routing::Routing;
pub use time::Time;
pub use transcript::Transcript;

use crate::view::View;

/// All views, in the order of their tabs.
pub fn all() -> Vec<Box<dyn View>> {
    vec![
        Box::<Transcript>::default(),
        Box::<Routing>::default(),
        Box::<Expert>::default(),
        Box::<Balance>::default(),
        Box::<Latents>::default(),
        Box::<Attention>::default(),
        Box::<Depth>::default(),
        Box::<Mtp>::default(),
        Box::<Time>::default(),
        Box::<Change>::default(),
        Box::<Compare>::default(),
    ]
}
