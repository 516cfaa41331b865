//! The key with which a command speaks to a server.

use std::path::Path;

use anyhow::{Context, bail};

/// The key in a file: the first line's only word, or its second one where it has the form of `--api-key-file` of `serve`.
/// Without a file, `$MOEWE_API_KEY`, if it is set.
pub fn presented(file: Option<&Path>) -> anyhow::Result<Option<String>> {
    let Some(file) = file else { return Ok(std::env::var("MOEWE_API_KEY").ok().filter(|key| !key.is_empty())) };
    let text =
        std::fs::read_to_string(file).with_context(|| format!("--api-key-file: cannot read {}", file.display()))?;
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    let words: Vec<&str> = lines.take(1).flat_map(str::split_whitespace).collect();
    match words[..] {
        [key] | [_, key, ..] => Ok(Some(key.to_owned())),
        [] => {
            let expected = "expected a line with a key, or with a name and a key";
            bail!("--api-key-file: {}: there is no key in it; {expected}", file.display())
        }
    }
}
