//! Progress bars on standard error; nothing where that is no terminal.

use std::sync::Mutex;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Bars for stages of work, one after the other.
#[derive(Default)]
pub struct Bars {
    current: Mutex<Option<(&'static str, ProgressBar)>>,
}

impl Bars {
    /// Sets the bar of a stage, beginning it if another one is shown. It counts bytes or pieces.
    pub fn set(&self, stage: &'static str, done: u64, total: u64, counts_bytes: bool) {
        let mut current = self.current.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if current.as_ref().is_none_or(|(shown, _)| *shown != stage) {
            if let Some((_, bar)) = current.take() {
                bar.finish_and_clear();
            }
            let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
            let template = if counts_bytes {
                "{msg:<20} [{bar:30}] {bytes}/{total_bytes} {binary_bytes_per_sec} {eta}"
            } else {
                "{msg:<20} [{bar:30}] {pos}/{len} {eta}"
            };
            bar.set_style(ProgressStyle::with_template(template).expect("a constant template").progress_chars("=> "));
            bar.set_message(stage);
            *current = Some((stage, bar));
        }
        if let Some((_, bar)) = &*current {
            bar.set_length(total);
            bar.set_position(done);
        }
    }
}

impl Drop for Bars {
    fn drop(&mut self) {
        let current = self.current.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some((_, bar)) = &*current {
            bar.finish_and_clear();
        }
    }
}
