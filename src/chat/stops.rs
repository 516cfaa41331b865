//! Stop strings.

/// Lets text through up to the first stop string.
///
/// That is the one that is complete first; of several that are complete with the same character, the longest.
#[derive(Debug)]
pub struct Stops {
    texts: Vec<String>,
    /// The end of the text so far, as far as a stop string may begin there.
    held: String,
    hit: bool,
}

impl Stops {
    pub fn new(mut stops: Vec<String>) -> Self {
        stops.retain(|stop| !stop.is_empty());
        Self { texts: stops, held: String::new(), hit: false }
    }

    /// Whether a stop string was met; there is no more text then.
    pub fn hit(&self) -> bool {
        self.hit
    }

    /// Takes text and gives what certainly stands before any stop string.
    pub fn push(&mut self, text: &str) -> String {
        if self.hit {
            return String::new();
        }
        self.held += text;
        let ends = self.texts.iter().filter_map(|stop| Some((self.held.find(stop)?, stop.len())));
        if let Some((at, _)) = ends.min_by_key(|(at, len)| (at + len, *at)) {
            self.hit = true;
            self.held.truncate(at);
            return std::mem::take(&mut self.held);
        }
        let longest = self.texts.iter().map(String::len).max().unwrap_or(1) - 1;
        let from = self.held.len().saturating_sub(longest);
        let may_begin = |at: &usize| {
            let tail = self.held.get(*at..);
            tail.is_some_and(|tail| self.texts.iter().any(|stop| stop.starts_with(tail)))
        };
        let keep = (from..self.held.len()).find(may_begin).unwrap_or(self.held.len());
        let held = self.held.split_off(keep);
        std::mem::replace(&mut self.held, held)
    }

    /// Gives what was held back: no stop string can follow.
    pub fn flush(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}
