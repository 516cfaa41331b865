//! Heavy work off the thread that draws.

use std::sync::mpsc::{Receiver, TryRecvError, channel};

/// A count of tokens in coarse steps (a thirty-second of it or so, 256 at most): for keys of work that need not be done
/// again for every token.
pub fn coarse(tokens: u64) -> u64 {
    tokens - tokens % (tokens.next_power_of_two() / 32).clamp(1, 256)
}

/// The newest result of a computation that runs beside the window. While a newer one is being made the older one is shown;
/// no more than one runs at a time, so a key that changes with every token does not pile up work.
#[derive(Debug)]
pub struct Latest<K, T> {
    value: Option<(K, T)>,
    running: Option<(K, Receiver<T>)>,
}

impl<K, T> Default for Latest<K, T> {
    fn default() -> Self {
        Self { value: None, running: None }
    }
}

impl<K: PartialEq + Clone, T: Send + 'static> Latest<K, T> {
    /// The newest result there is, be it for another key. Starts `compute` if the key has no result yet and nothing runs.
    /// Wakes the window when it is done.
    pub fn get(&mut self, ctx: &egui::Context, key: &K, compute: impl FnOnce() -> T + Send + 'static) -> Option<&T> {
        self.get_prepared(ctx, key, || compute)
    }

    /// The same for a computation whose input is itself costly to gather: `prepare` gathers it on this thread, and is
    /// called only if a computation starts.
    pub fn get_prepared<F>(&mut self, ctx: &egui::Context, key: &K, prepare: impl FnOnce() -> F) -> Option<&T>
    where
        F: FnOnce() -> T + Send + 'static,
    {
        self.take();
        let is_new = self.value.as_ref().is_none_or(|(of, _)| of != key);
        if is_new && self.running.is_none() {
            let (sender, receiver) = channel();
            let ctx = ctx.clone();
            let compute = prepare();
            std::thread::spawn(move || {
                let _ = sender.send(compute()); // the view may be gone
                ctx.request_repaint();
            });
            self.running = Some((key.clone(), receiver));
        }
        self.value.as_ref().map(|(_, value)| value)
    }

    /// Whether [`Latest::get`] would start computing for a key: so that what `compute` needs is copied only then.
    pub fn lacks(&mut self, key: &K) -> bool {
        self.take();
        self.running.is_none() && self.value.as_ref().is_none_or(|(of, _)| of != key)
    }

    /// The newest result there is, and for which key.
    pub fn value(&self) -> Option<(&K, &T)> {
        self.value.as_ref().map(|(key, value)| (key, value))
    }

    /// Whether the result that is shown is not the one that was asked for last.
    pub fn is_busy(&self) -> bool {
        self.running.is_some()
    }

    fn take(&mut self) {
        if let Some((key, receiver)) = self.running.take() {
            match receiver.try_recv() {
                Ok(value) => self.value = Some((key, value)),
                Err(TryRecvError::Empty) => self.running = Some((key, receiver)),
                Err(TryRecvError::Disconnected) => {} // it panicked; the next call tries again
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::coarse;

    #[test]
    fn coarse_counts_take_few_values_and_are_never_far_behind() {
        let values: std::collections::BTreeSet<u64> = (0..4096).map(coarse).collect();
        assert!(values.len() < 150, "{}", values.len());
        assert!((0..100_000).all(|tokens| tokens - coarse(tokens) <= (tokens / 16).min(255)));
    }
}
