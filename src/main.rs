//! The command `moewe`.

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    quiet_driver();
    cli::run()
}

/// Mesa's device-select layer complains on standard error, once for each instance, where there is no XDG_RUNTIME_DIR (in
/// containers, say). It has nothing to select for us: moewe lists and picks devices itself.
fn quiet_driver() {
    if std::env::var_os("XDG_RUNTIME_DIR").is_none() {
        // SAFETY: `main` calls this before any other thread exists.
        #[allow(unsafe_code)]
        unsafe {
            std::env::set_var("NODEVICE_SELECT", "1");
        }
    }
}
