//! Executes the plans of compiled models on Vulkan devices.
//!
//! The way of a token: [`Gpu::open`] opens a device, [`Model::load`] uploads a bundle's weights and makes its
//! pipelines, [`Session::new`] allocates caches and activations, and [`generate()`] (or [`Session::prefill`] and
//! [`Session::decode`]) runs the plan's forward program. [`Session::run`] and [`Session::read_taps`] run any program
//! once and read what it computed. This crate knows buffers, kernels and grids; what they compute is the plan's affair.

mod buffers;
mod check;
mod decode;
mod device;
mod error;
mod generate;
mod measure;
mod memory;
mod model;
mod pages;
mod pipelines;
mod record;
mod sequences;
mod session;
mod taps;

pub use decode::MAX_BURST;
pub use device::{AdapterInfo, DeviceType, Gpu, Selector, list};
pub use error::{Error, Result};
pub use generate::{GenerateOptions, Generated, StopReason, Timing, continue_sequence, generate};
pub use measure::{Bandwidth, copy_bandwidth, dispatch_cost, submit_latency};
pub use model::{Model, Progress};
pub use sequences::SequenceId;
pub use session::{Batch, Session, SessionOptions};
pub use taps::{Tap, Words};
