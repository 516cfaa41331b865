//! Recordings come back as they were, whatever becomes of the file.
#![allow(missing_docs)]

mod damage;
mod going_on;
mod hostile;
#[cfg(unix)]
mod processes;
mod replay;
mod round_trips;
mod tools;
mod wire;
