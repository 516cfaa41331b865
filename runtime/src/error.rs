//! Errors of devices, models, sessions and generation.

use std::path::PathBuf;

use moewe_plan::{Precision, ProgramKind};

/// Result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Why something could not be run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No Vulkan device was found.
    #[error(
        "no Vulkan device was found: install a driver (Debian, Ubuntu: `apt-get install mesa-vulkan-drivers \
         libvulkan1` gives a software one); `moewe doctor` shows what is there"
    )]
    NoDevice,
    /// The wanted device is not there.
    #[error("no device is {wanted}; there are: {found}")]
    NoSuchDevice {
        /// What was asked for.
        wanted: String,
        /// The devices that exist, each as `index: name`.
        found: String,
    },
    /// The driver refused to open the device.
    #[error("{device} could not be opened: {what}")]
    Open {
        /// Name of the device.
        device: String,
        /// What the driver said.
        what: String,
    },
    /// The caller asked to stop.
    #[error("interrupted")]
    Interrupted,
    /// The device stopped answering.
    #[error("{device} was lost: {what}; start again, with a smaller batch or model if it happens again")]
    DeviceLost {
        /// Name of the device.
        device: String,
        /// What the driver said.
        what: String,
    },
    /// The device refused a command.
    #[error("{device} refused a command: {what}")]
    Refused {
        /// Name of the device.
        device: String,
        /// What the driver or the validator said.
        what: String,
    },
    /// Device memory is exhausted.
    #[error(
        "out of memory on {device}: {name} needs {bytes} bytes, {held} are in use{}; choose a smaller model, \
         narrower weights (`moewe compile --weights`), fewer sequences or a smaller context",
        budget.map(|b| format!(" of {b} available")).unwrap_or_default()
    )]
    OutOfMemory {
        /// Name of the device.
        device: String,
        /// The buffer, or what the buffers are for.
        name: String,
        /// Bytes asked for.
        bytes: u64,
        /// Bytes held by this program.
        held: u64,
        /// Bytes there are, if known.
        budget: Option<u64>,
    },
    /// A buffer is larger than the device allows.
    #[error(
        "buffer {name} needs {bytes} bytes, at most {limit} are possible on this device; compile for a device like \
         it (`--target lavapipe`, `--target webgpu` or `--target generic-vulkan`)"
    )]
    BufferTooLarge {
        /// The buffer.
        name: String,
        /// Bytes needed.
        bytes: u64,
        /// Bytes possible.
        limit: u64,
    },
    /// The device lacks something that the plan needs.
    #[error(
        "{device} offers {found} {what}, the bundle (compiled for {profile}) needs {required}; compile the \
         checkpoint again for a device like this: `--target {remedy}`"
    )]
    Requirement {
        /// Name of the device.
        device: String,
        /// The limit or feature.
        what: &'static str,
        /// What the device offers.
        found: u64,
        /// What the plan needs.
        required: u64,
        /// The profile that the plan was compiled for.
        profile: String,
        /// A profile that fits better.
        remedy: &'static str,
    },
    /// The device lacks the cooperative matrices that programs of precision `fast` multiply by.
    #[error(
        "{device} has cooperative matrices of f16: {found}, in subgroups of {subgroups}; in precision fast the bundle (compiled for \
         {profile}) needs {size}×{size} in subgroups of {lanes}; run it with `--precision exact`, or compile the checkpoint \
         again for a device like this: `--target {remedy}`"
    )]
    Cooperative {
        /// Name of the device.
        device: String,
        /// Sizes that the device has, in words.
        found: String,
        /// Invocations of its subgroups, in words.
        subgroups: String,
        /// Rows and columns that the plan needs.
        size: u32,
        /// Invocations of a subgroup that the plan needs.
        lanes: u32,
        /// The profile that the plan was compiled for.
        profile: String,
        /// A profile that fits better.
        remedy: &'static str,
    },
    /// The device was opened without the cooperative matrices that it has and the program needs.
    #[error("{device} was opened without cooperative matrices, which the program needs; open it by `Gpu::for_plan`")]
    NotCooperative {
        /// Name of the device.
        device: String,
    },
    /// A kernel could not be made into a pipeline.
    #[error("kernel {kernel} is not accepted by {device}: {what}")]
    Kernel {
        /// The kernel's name.
        kernel: String,
        /// Name of the device.
        device: String,
        /// What the validator or the driver said.
        what: String,
    },
    /// The plan contradicts itself in a way that only shows when it runs.
    #[error("the plan cannot run: {what}; compile the checkpoint again")]
    Plan {
        /// What was found and what was expected.
        what: String,
    },
    /// The bundle has no such program.
    #[error("the bundle has no {} program for precision {}", kind_name(*kind), precision.name())]
    NoProgram {
        /// Kind asked for.
        kind: ProgramKind,
        /// Precision asked for.
        precision: Precision,
    },
    /// A program of a kind that the model or session was not made for.
    #[error("the {} program was not named when the {place} was made", kind_name(*kind))]
    NotPrepared {
        /// Kind asked for.
        kind: ProgramKind,
        /// `model` or `session`.
        place: &'static str,
    },
    /// A batch is larger than any program of its kind.
    #[error(
        "a batch of {tokens} tokens and {rows} logits rows: the largest {} program takes {max_tokens} and {max_rows}",
        kind_name(*kind)
    )]
    BatchTooLarge {
        /// Kind of the program.
        kind: ProgramKind,
        /// Tokens of the batch.
        tokens: usize,
        /// Rows of the batch.
        rows: usize,
        /// Tokens of the largest program.
        max_tokens: u64,
        /// Rows of the largest program.
        max_rows: u64,
    },
    /// A grid is larger than the device can dispatch.
    #[error(
        "step {step} needs {found} workgroups in one dimension, the device dispatches at most {limit}; use a smaller chunk"
    )]
    GridTooLarge {
        /// Label of the step.
        step: String,
        /// Workgroups needed.
        found: u64,
        /// Workgroups possible.
        limit: u64,
    },
    /// A batch that makes no sense.
    #[error("the batch is wrong: {what}")]
    Batch {
        /// What was found and what was expected.
        what: String,
    },
    /// No tokens at all.
    #[error("the prompt is empty; give at least one token")]
    EmptyPrompt,
    /// A token id that the model does not have.
    #[error("token {index} of the prompt is {token}, the vocabulary has {vocab_size} tokens (0 to {})", vocab_size - 1)]
    TokenOutOfVocabulary {
        /// Where in the prompt.
        index: usize,
        /// The id.
        token: u32,
        /// Size of the vocabulary.
        vocab_size: u32,
    },
    /// A sequence does not fit the model's context.
    #[error("{tokens} tokens, the model's context holds {max_context}; shorten the prompt")]
    ContextExceeded {
        /// Tokens of the sequence.
        tokens: usize,
        /// Most tokens of a sequence.
        max_context: usize,
    },
    /// The latent cache is full.
    #[error(
        "the latent cache is full: {needed} more pages of {} tokens are needed, {free} of {total} are free; use fewer \
         or shorter sequences, or allow the cache more memory",
        moewe_plan::PAGE_TOKENS
    )]
    OutOfPages {
        /// Pages needed.
        needed: usize,
        /// Pages free.
        free: usize,
        /// All pages.
        total: usize,
    },
    /// A page that nobody uses, or that does not exist, cannot be shared.
    #[error("page {page} of {total} is free or not there, so nothing in it can be used")]
    FreePage {
        /// The page.
        page: u32,
        /// All pages.
        total: usize,
    },
    /// All slots for sequences are taken.
    #[error("the session holds {max_sequences} sequences already; remove one or allow more")]
    OutOfSequences {
        /// Slots of the session.
        max_sequences: u32,
    },
    /// A sequence that was removed, or is of another session.
    #[error("sequence {slot} is not in this session (any more)")]
    UnknownSequence {
        /// Slot it had.
        slot: u32,
    },
    /// The model computed no usable logits for a sequence.
    #[error("no token can be drawn, since no logit is a number: the weights or what was computed with them hold NaN")]
    Poisoned,
    /// A sequence is not ready for what was asked.
    #[error("sequence {slot} has {pending} tokens that were not run yet, {expected} expected")]
    Pending {
        /// Slot of the sequence.
        slot: u32,
        /// Tokens not run yet.
        pending: usize,
        /// What was expected.
        expected: &'static str,
    },
    /// Sampling parameters that make no sense.
    #[error("{field} is {found}, {expected} expected")]
    Sampling {
        /// Name of the parameter.
        field: &'static str,
        /// Its value.
        found: f32,
        /// What it may be.
        expected: &'static str,
    },
    /// A mask of tokens that cannot be.
    #[error("the mask of tokens does not fit: {what}")]
    Mask {
        /// What was found and what was expected.
        what: String,
    },
    /// A bias of logits that cannot be.
    #[error("the bias of logits does not fit: {what}")]
    Bias {
        /// What was found and what was expected.
        what: String,
    },
    /// Values of parameters that do not fit the plan.
    #[error("the parameters do not fit: {what}")]
    Parameters {
        /// What was found and what was expected.
        what: String,
    },
    /// The program has no such tap.
    #[error("there is no tap {name:?} in the {} program", kind_name(*kind))]
    NoTap {
        /// Name asked for.
        name: String,
        /// Kind of the program.
        kind: ProgramKind,
    },
    /// Taps were asked for before the program ran, or when it had run without some of them.
    #[error("the {} program has not run last, or not as a whole, so its taps cannot be read", kind_name(*kind))]
    NotRun {
        /// Kind of the program.
        kind: ProgramKind,
    },
    /// An engine has no room for the text of another request.
    #[error(
        "no room for another request: it counts as {bytes} bytes, {used} of {limit} are in use; try again when others \
         are done"
    )]
    QueueFull {
        /// Bytes of the request.
        bytes: u64,
        /// Bytes of requests that are not done.
        used: u64,
        /// Bytes there are.
        limit: u64,
    },
    /// As many requests wait as an engine lets wait.
    #[error("{waiting} requests wait, at most {limit} may; try again when others are done")]
    TooManyWaiting {
        /// Requests that wait.
        waiting: usize,
        /// How many may.
        limit: usize,
    },
    /// A request that makes no sense.
    #[error("the request is wrong: {what}")]
    Request {
        /// What was found and what was expected.
        what: String,
    },
    /// What was to constrain a text failed, or allows no token.
    #[error("the constraint of the text failed: {what}")]
    Constraint {
        /// What it said.
        what: String,
    },
    /// Which experts were chosen is not known, since what was read of a pass found no room.
    #[error(
        "the chosen experts are not known: frames did not fit the session's {ring_bytes} bytes for them; allow more"
    )]
    FramesLost {
        /// Bytes for frames ([`crate::Watch::ring_bytes`]).
        ring_bytes: u64,
    },
    /// An engine has ended before the request was done.
    #[error("the engine was stopped before the request was done")]
    EngineStopped,
    /// No thread could be started.
    #[error("a thread could not be started: {source}")]
    Thread {
        /// What the system said.
        source: std::io::Error,
    },
    /// The directory of the prefix cache cannot be made, or no file can be made in it.
    #[error("{} cannot hold the prefix cache: {source}", path.display())]
    CacheDir {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The prefix cache may not hold even one page.
    #[error("the prefix cache on disk may take {max_bytes} bytes, one page of it takes {page}; allow it more")]
    CacheTooSmall {
        /// Bytes allowed.
        max_bytes: u64,
        /// Bytes of a page's file.
        page: u64,
    },
    /// The bundle is damaged or lacks a file.
    #[error(transparent)]
    Bundle(#[from] moewe_plan::Error),
}

/// A word for messages.
pub(crate) fn kind_name(kind: ProgramKind) -> String {
    match kind {
        ProgramKind::Forward => "forward".into(),
        ProgramKind::Watch => "watch".into(),
        ProgramKind::Trace => "trace".into(),
        ProgramKind::Draft { module } => format!("draft {module}"),
    }
}
