//! Says which tests have not run.

use std::io::Write;

/// Says that a test, or a part of it, has not run for want of a device. What tests print is only shown if they fail; this always is.
pub fn skipped(what: &str) {
    let _ = writeln!(std::io::stderr(), "SKIPPED: {what}"); // nobody reads it then
}
