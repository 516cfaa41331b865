//! Kernel sources, their variants, linking, validation and reflection.
//!
//! A kernel is a WESL skeleton with sockets: modules `weight`, `latent` and `reduce` into which a [`Variant`] plugs one
//! of several implementations, a generated module `tune` with its constants, and flags that switch parts on.
//! [`link()`] makes one WGSL text of it, which naga has validated with no more capabilities than the variant declares.

mod link;
mod skeleton;
mod variant;

pub use link::{Error, Linked, link};
pub use skeleton::{SKELETONS, Skeleton, skeleton};
pub use variant::{BLOCK, Const, Reduce, Variant};
