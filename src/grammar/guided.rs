//! A text that follows a grammar.

use llguidance::Matcher;
use moewe_runtime::engine::Constraint;

use super::reason;

/// Allows the tokens that some text of the grammar goes on with.
pub(super) struct Guided {
    matcher: Matcher,
}

impl Guided {
    pub fn new(matcher: Matcher) -> Self {
        Self { matcher }
    }
}

impl Constraint for Guided {
    fn allowed(&mut self, mask: &mut [u32]) -> Result<(), String> {
        let allowed = self.matcher.compute_mask().map_err(|error| said(&error))?;
        for (word, allowed) in mask.iter_mut().zip(allowed.as_slice()) {
            *word = *allowed;
        }
        Ok(())
    }

    fn drawn(&mut self, token: u32) -> Result<(), String> {
        self.matcher.consume_token(token).map_err(|error| said(&error))
    }

    fn ended(&self) -> bool {
        self.matcher.is_stopped() && self.matcher.stop_reason().is_ok()
    }
}

/// What went wrong. The grammar's author is a client, so that the state is not for the logs.
fn said(error: &impl ToString) -> String {
    match reason(&error.to_string()).as_str() {
        "NoExtensionBias" => "no token of the vocabulary goes on with a text of the grammar".into(),
        reason => format!("the grammar is too complex here: {reason}"),
    }
}

impl std::fmt::Debug for Guided {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Guided").field("stop", &self.matcher.stop_reason()).finish_non_exhaustive()
    }
}
