//! From a checkpoint to a bundle: reading and checking checkpoints, the typed graph, its passes, the choice of kernels,
//! packing of weights and memory planning. Nothing here needs or knows a GPU.

pub mod checkpoint;
pub mod compile;
pub mod config;
pub mod dtype;
pub mod error;
pub mod graph;
pub mod infer;
pub mod inspect;
pub mod lower;
pub mod memory;
pub mod model;
pub mod pack;
pub mod passes;
pub mod profile;
pub mod quantize;
pub mod select;
pub mod synth;
pub mod tensors;
pub mod write;
