//! Executes the plans of compiled models on Vulkan devices.
//!
//! The way of a token: [`Gpu::open`] opens a device, [`Model::load`] uploads a bundle's weights and makes its
//! pipelines, [`Session::new`] allocates caches and activations, and [`generate()`] (or [`Session::prefill`] and
//! [`Session::decode`]) runs the plan's forward program. [`Session::run`] and [`Session::read_taps`] run any program
//! once and read what it computed. A session with [`Watch`] reads taps of all that it runs, while it runs, and hands
//! them out as [`moewe_plan::TapFrame`]s without ever waiting for a reader. This crate knows buffers, kernels and grids; what they compute is the plan's affair.

mod buffers;
mod cache;
mod check;
mod constraints;
mod decode;
mod device;
mod drafts;
pub mod engine;
mod error;
mod frame;
mod generate;
mod load;
mod measure;
mod memory;
mod model;
mod pages;
mod pipeline_cache;
mod pipelines;
mod record;
mod ring;
mod sequences;
mod session;
mod step;
mod taps;
mod timing;
mod watch;

pub use decode::MAX_BURST;
pub use device::{AdapterInfo, DeviceType, Gpu, Handles, Selector, list};
pub use error::{Error, Result};
pub use generate::{GenerateOptions, Generated, StopReason, Timing, continue_sequence, generate};
pub use load::Loaded;
pub use measure::{
    Bandwidth, Bench, Dispatch, MatrixRates, Store, copy_bandwidth, dispatch_cost, matrix_rates, submit_latency,
};
pub use model::{LoadOptions, Model, Progress};
pub use pages::Page;
pub use ring::FrameReceiver;
pub use sequences::SequenceId;
pub use session::{Batch, Session, SessionOptions};
pub use step::{Stepped, TokenLogprobs, Work};
pub use taps::{Tap, Words};
pub use watch::{DECODES_PER_TIMED_RUN, Watch};
