//! The bundle of a compiled model: what `moewe compile` writes and what the runtime executes.
//!
//! A [`Plan`] says which kernels run in which order over which buffers. It names no operation of any model: a
//! [`Step`] is a kernel, its bindings and its grid. What the runtime must know to serve tokens (which buffer holds
//! the token ids, which one is a layer's latent cache) is said by each buffer's [`Role`].

mod batch;
mod bundle;
mod dim;
mod edit;
mod error;
mod frame;
mod latent;
mod mapped;
mod taps;
mod types;
mod verify;

pub use batch::{
    BIASED, DRAFT_WORDS, FINISHED_STEPS, Group, Header, LOGPROB_TOP, LOGPROB_WORDS, MASKED, MAX_DRAFT_MODULES,
    MAX_DRAFTS, PAGE_TOKENS, POISONED, REJECTED, Sampling, TokenInfo,
};
pub use bundle::{Bundle, Entry, MANIFEST, Manifest, PLAN, Staging, Verifier, WeightFiles, Window, hash_file};
pub use dim::{Dim, Symbol, Symbols};
pub use edit::{Edit, EditError, FORCED, MUTED, Place, check_edits, parameter_values};
pub use error::Error;
pub use frame::{FrameTensor, FrameToken, Numbers, RunTimes, TapFrame};
pub use latent::Latent;
pub use mapped::Mapped;
pub use taps::TapChoice;
pub use types::{
    Access, Binding, BindingLayout, Buffer, Cost, DType, Indirect, Kernel, ModelInfo, Parameter, ParameterKind, Plan,
    Precision, Program, ProgramKind, Requirements, Role, SCALE_GROUP, Segment, Shard, Step, TOP_TOKENS, TapGroup,
    TapSpec, TunedOn, Weight, WeightFile, WeightFormat, When,
};

/// Version of the bundle format. A bundle of another version is refused; compile it again.
pub const FORMAT_VERSION: u32 = 6;
