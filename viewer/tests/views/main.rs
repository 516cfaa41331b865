//! Pictures and interaction of the views, drawn without a window by whatever Vulkan device there is (a software driver
//! will do). `UPDATE_SNAPSHOTS=1` writes the pictures anew; look at them before they are committed.

mod app;
mod attention;
mod balance;
mod change;
mod compare;
mod depth;
mod expert;
mod harness;
mod latents;
mod mtp;
mod puppets;
mod routing;
mod time;
mod transcript;
