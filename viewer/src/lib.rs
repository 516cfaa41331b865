//! Views of expert routing and attention latents over what a plan's taps show: live, recorded or made up.
//!
//! Data flows one way: a [`source::Source`] gives events, the [`store::Store`] keeps what they bring, the views in
//! [`views`] draw it. What a user wants goes back as a [`source::Command`]. Nothing here knows how a model runs.

pub mod analysis;
pub mod app;
pub mod bars;
pub mod colour;
pub mod export;
pub mod heat;
pub mod jobs;
pub mod layout;
pub mod numbers;
pub mod offscreen;
pub mod recording;
pub mod search;
pub mod selection;
pub mod source;
pub mod store;
pub mod strip;
pub mod subject;
pub mod synthetic;
pub mod tally;
pub mod view;
pub mod views;
pub mod window;
