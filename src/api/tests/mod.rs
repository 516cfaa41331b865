//! What clients send, rightly and wrongly, and what they are sent.

mod accepted;
mod answers;
mod document;
mod hostile;
mod refused;
