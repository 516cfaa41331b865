//! What views compute: pure functions, tested without a window.

pub mod attention;
pub mod balance;
pub mod depth;
pub mod divergence;
pub mod drafts;
pub mod eplb;
pub mod expert;
pub mod latents;
pub mod pca;
pub mod routing;
pub mod text;
pub mod times;
