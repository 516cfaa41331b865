//! Ctrl-C: the first asks to stop cleanly, the second ends the program.

use std::io::{IsTerminal, Write};
use std::sync::atomic::{AtomicBool, Ordering};

static INTERRUPTED: AtomicBool = AtomicBool::new(false);
/// What work watches: set with the first, unless it is only to be noted.
static STOP: AtomicBool = AtomicBool::new(false);
static NOTED: AtomicBool = AtomicBool::new(false);
static WAITING: AtomicBool = AtomicBool::new(false);

/// Catches SIGINT from now on.
pub fn install() {
    let installed = ctrlc::set_handler(|| {
        if INTERRUPTED.swap(true, Ordering::SeqCst) || WAITING.load(Ordering::SeqCst) {
            if std::io::stderr().is_terminal() {
                let _ = writeln!(std::io::stderr());
            }
            std::process::exit(130);
        }
        stop();
    });
    // Without a handler Ctrl-C ends the program at once, which is acceptable.
    drop(installed);
}

/// Waits for input that may never come: meanwhile the first Ctrl-C ends the program.
pub fn while_waiting<T>(wait: impl FnOnce() -> T) -> T {
    WAITING.store(true, Ordering::SeqCst);
    if is_set() {
        // It came when nobody looked any more, and nobody looks now.
        std::process::exit(130);
    }
    let result = wait();
    WAITING.store(false, Ordering::SeqCst);
    result
}

/// Whether Ctrl-C was pressed.
pub fn is_set() -> bool {
    INTERRUPTED.load(Ordering::SeqCst)
}

/// Stops work that watches [`flag`], unless Ctrl-C is only noted now.
pub fn stop() {
    STOP.store(!NOTED.load(Ordering::SeqCst), Ordering::SeqCst);
}

/// Goes on after a Ctrl-C that was heeded.
pub fn clear() {
    INTERRUPTED.store(false, Ordering::SeqCst);
    STOP.store(false, Ordering::SeqCst);
}

/// An error if Ctrl-C was pressed.
pub fn check() -> anyhow::Result<()> {
    if is_set() { Err(anyhow::anyhow!("interrupted")) } else { Ok(()) }
}

/// The flag for work that watches one.
pub fn flag() -> &'static AtomicBool {
    &STOP
}

/// As long as it lives, Ctrl-C is only noted ([`is_set`]) and does not stop work that watches [`flag`]: whoever started
/// that ends it in order.
pub struct Noted(());

impl Noted {
    /// From now on.
    pub fn new() -> Self {
        NOTED.store(true, Ordering::SeqCst);
        Self(())
    }
}

impl Drop for Noted {
    fn drop(&mut self) {
        NOTED.store(false, Ordering::SeqCst);
        STOP.store(is_set(), Ordering::SeqCst);
    }
}
