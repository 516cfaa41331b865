//! Progress bars on standard error; nothing where that is no terminal.

use std::sync::{Mutex, PoisonError};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Bars for stages of work, one below the other while they are under way at the same time.
pub struct Bars {
    lines: MultiProgress,
    current: Mutex<Vec<(&'static str, ProgressBar)>>,
}

impl Default for Bars {
    fn default() -> Self {
        Self { lines: MultiProgress::with_draw_target(ProgressDrawTarget::stderr()), current: Mutex::default() }
    }
}

impl Bars {
    /// Sets the bar of a stage, which is shown until the stage is done. It counts bytes or pieces.
    pub fn set(&self, stage: &'static str, done: u64, total: u64, counts_bytes: bool) {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        let shown = current.iter().position(|(shown, _)| *shown == stage);
        if done >= total {
            if let Some(shown) = shown {
                self.clear(&current.remove(shown).1);
            }
            return;
        }
        let shown = shown.unwrap_or_else(|| {
            let bar = self.lines.add(ProgressBar::new(total));
            let template = if counts_bytes {
                "{msg:<20} [{bar:30}] {bytes}/{total_bytes} {binary_bytes_per_sec} {eta}"
            } else {
                "{msg:<20} [{bar:30}] {pos}/{len} {eta}"
            };
            bar.set_style(ProgressStyle::with_template(template).expect("a constant template").progress_chars("=> "));
            bar.set_message(stage);
            current.push((stage, bar));
            current.len() - 1
        });
        let bar = &current[shown].1;
        bar.set_length(total);
        bar.set_position(done);
    }

    fn clear(&self, bar: &ProgressBar) {
        bar.finish_and_clear();
        self.lines.remove(bar);
    }
}

impl Drop for Bars {
    fn drop(&mut self) {
        let mut current = std::mem::take(&mut *self.current.lock().unwrap_or_else(PoisonError::into_inner));
        current.drain(..).for_each(|(_, bar)| self.clear(&bar));
    }
}
