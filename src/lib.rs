//! The parts of the `moewe` command that are of use without a command line.

pub mod api;
pub mod chat;
pub mod eval;
pub mod grammar;
pub mod heatmap;
pub mod ledger;
pub mod live;
pub mod remote;
pub mod serve;
pub mod subject;
pub mod text;
pub mod trace;
pub mod tune;
pub mod watch;
