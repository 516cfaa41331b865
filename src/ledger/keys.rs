//! API keys: who may ask, and how much they may spend.

use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use subtle::{ConditionallySelectable, ConstantTimeEq};

use super::Amount;

/// The name of everyone where there is no key file.
pub const ANONYMOUS: &str = "anonymous";

/// Characters that a key has at least.
const MIN_KEY: usize = 16;
/// Characters that a name has at most.
const MAX_NAME: usize = 64;
/// Bytes that a key file may have.
const MAX_FILE: u64 = 16 << 20;

/// Why a key file cannot be used. None of these tell what is in the file: it may be a key in the wrong place.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The file cannot be read.
    #[error("cannot read the key file {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file is too large for a list of keys.
    #[error("the key file {} has more than {} MiB", path.display(), MAX_FILE >> 20)]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// The file has no key, so that nobody could ask for anything.
    #[error("the key file {} has no keys: expected lines of NAME KEY [budget=12.50]", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// A line is wrong.
    #[error("{}:{line}: {reason}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// Which line, from 1.
        line: usize,
        /// What was expected.
        reason: String,
    },
}

/// Who asks.
#[derive(Clone, PartialEq, Eq)]
pub struct Key {
    name: String,
    /// BLAKE3 of the key. Keys are long and random, so that no salt is needed.
    hash: [u8; 32],
    budget: Option<Amount>,
}

impl Key {
    /// The name, which stands in the usage file and in metrics.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What this key may cost, ever.
    pub const fn budget(&self) -> Option<Amount> {
        self.budget
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Key").field("name", &self.name).field("budget", &self.budget).finish_non_exhaustive()
    }
}

/// The keys of a key file, or nobody in particular.
#[derive(Clone, Debug)]
pub struct Keys {
    /// Those of the file; without a file the one anonymous.
    all: Vec<Key>,
    open: bool,
    warning: Option<String>,
}

impl Keys {
    /// Everyone may ask and is named [`ANONYMOUS`].
    pub fn anonymous() -> Self {
        let anonymous = Key { name: ANONYMOUS.into(), hash: [0; 32], budget: None };
        Self { all: vec![anonymous], open: true, warning: None }
    }

    /// Reads a key file: lines of `NAME KEY [budget=12.50]`. `#` at the beginning of a line or of a word behind the key
    /// begins a comment.
    pub fn load(path: &Path) -> Result<Self, KeyError> {
        let read = |source| KeyError::Read { path: path.to_owned(), source };
        let file = File::open(path).map_err(read)?;
        let warning = exposed(&file).map_err(read)?.then(|| {
            format!("the key file {} can be read by every user of this system; chmod 600 mends that", path.display())
        });
        let mut text = Vec::new();
        file.take(MAX_FILE + 1).read_to_end(&mut text).map_err(read)?;
        if text.len() as u64 > MAX_FILE {
            return Err(KeyError::TooLarge { path: path.to_owned() });
        }
        let keys = parse(&text).map_err(|(line, reason)| KeyError::Line {
            path: path.to_owned(),
            line,
            reason: reason.to_string(),
        })?;
        if keys.is_empty() {
            return Err(KeyError::Empty { path: path.to_owned() });
        }
        Ok(Self { all: keys, open: false, warning })
    }

    /// What the person who runs the server should know about the file.
    pub fn warning(&self) -> Option<&str> {
        self.warning.as_deref()
    }

    /// Whether everyone may ask.
    pub const fn is_open(&self) -> bool {
        self.open
    }

    /// Whether any key has a budget. Without prices no budget is ever reached.
    pub fn any_budget(&self) -> bool {
        self.all.iter().any(|key| key.budget.is_some())
    }

    /// The key that was presented, if it is one of the file. All keys are compared, in constant time.
    pub fn check(&self, presented: &str) -> Option<&Key> {
        if self.open {
            return None;
        }
        let hash: [u8; 32] = blake3::hash(presented.as_bytes()).into();
        let mut found = 0u32;
        for (number, key) in (1u32..).zip(&self.all) {
            found.conditional_assign(&number, key.hash.ct_eq(&hash));
        }
        self.all.get((found as usize).checked_sub(1)?)
    }

    /// Who asks: the owner of the presented key, or the anonymous one where there is no key file.
    pub fn who(&self, presented: Option<&str>) -> Option<&Key> {
        if self.open { self.all.first() } else { self.check(presented?) }
    }
}

/// Whether every user of the system may read a file.
fn exposed(file: &File) -> io::Result<bool> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        Ok(file.metadata()?.permissions().mode() & 0o004 != 0)
    }
    #[cfg(not(unix))]
    {
        file.metadata().map(|_| false)
    }
}

/// What is wrong with a line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
enum LineError {
    #[error("is not UTF-8")]
    NotText,
    #[error("expected NAME KEY [budget=12.50], found one word")]
    NoKey,
    #[error("the name (first word) must be 1 to {MAX_NAME} of the characters A-Z a-z 0-9 _ . -")]
    Name,
    #[error("has the same name as line {0}")]
    SameName(usize),
    #[error("the key (second word) has {0} characters, it needs at least {MIN_KEY}: try openssl rand -hex 32")]
    Short(usize),
    #[error("the key (second word) must be printable ASCII")]
    NotAscii,
    #[error("has the same key as line {0}")]
    SameKey(usize),
    #[error("expected budget=AMOUNT or nothing behind the key")]
    Option,
    #[error("the budget {0}")]
    Budget(#[from] super::AmountError),
}

fn parse(text: &[u8]) -> Result<Vec<Key>, (usize, LineError)> {
    let mut keys = Vec::new();
    let (mut names, mut hashes) = (HashMap::new(), HashMap::new());
    let text = text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(text);
    for (number, line) in (1..).zip(text.split(|byte| *byte == b'\n')) {
        let key = parse_line(line).map_err(|error| (number, error))?;
        let Some(key) = key else { continue };
        if let Some(first) = names.insert(key.name.clone(), number) {
            return Err((number, LineError::SameName(first)));
        }
        if let Some(first) = hashes.insert(key.hash, number) {
            return Err((number, LineError::SameKey(first)));
        }
        keys.push(key);
    }
    Ok(keys)
}

fn parse_line(line: &[u8]) -> Result<Option<Key>, LineError> {
    let line = str::from_utf8(line).map_err(|_| LineError::NotText)?;
    let mut words = line.split_ascii_whitespace().take_while(|word| !word.starts_with('#'));
    let Some(name) = words.next() else { return Ok(None) };
    let Some(key) = words.next() else { return Err(LineError::NoKey) };
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
    if name.len() > MAX_NAME || !name.bytes().all(allowed) {
        return Err(LineError::Name);
    }
    if !key.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(LineError::NotAscii);
    }
    if key.len() < MIN_KEY {
        return Err(LineError::Short(key.len()));
    }
    let budget = match words.next() {
        None => None,
        Some(word) => Some(word.strip_prefix("budget=").ok_or(LineError::Option)?.parse()?),
    };
    if words.next().is_some() {
        return Err(LineError::Option);
    }
    Ok(Some(Key { name: name.into(), hash: blake3::hash(key.as_bytes()).into(), budget }))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use proptest::prelude::*;

    use super::*;

    const ALICE: &str = "sk-alice-0123456789abcdef";
    const BOB: &str = "sk-bob#0123456789abcdef";

    fn file(text: impl AsRef<[u8]>) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keys");
        fs::write(&path, text).unwrap();
        (dir, path)
    }

    #[test]
    fn reads_names_keys_and_budgets() {
        let (_dir, path) = file(format!(
            "\u{feff}# who may ask\r\n\r\nalice {ALICE} budget=12.50 # until May\r\n\t bob.2 \t{BOB}\n#carol sk-carol-0123456789\n"
        ));
        let keys = Keys::load(&path).unwrap();
        let alice = keys.check(ALICE).unwrap();
        assert_eq!((alice.name(), alice.budget()), ("alice", Some("12.5".parse().unwrap())));
        let bob = keys.who(Some(BOB)).unwrap();
        assert_eq!((bob.name(), bob.budget()), ("bob.2", None));
        for wrong in ["", "alice", "sk-carol-0123456789", &ALICE[1..], &format!("{ALICE} "), &ALICE.to_uppercase()] {
            assert_eq!(keys.check(wrong), None, "{wrong:?}");
        }
        assert_eq!(keys.who(None), None);
        assert!(!keys.is_open() && keys.any_budget());
    }

    #[test]
    fn without_a_file_everyone_is_anonymous() {
        let keys = Keys::anonymous();
        for presented in [None, Some(""), Some(ALICE)] {
            assert_eq!(keys.who(presented).unwrap().name(), ANONYMOUS);
        }
        assert_eq!(keys.check(ALICE), None);
        assert!(keys.is_open() && !keys.any_budget());
    }

    #[test]
    fn shows_no_key() {
        let (_dir, path) = file(format!("alice {ALICE} budget=1\nbob {BOB}"));
        let keys = Keys::load(&path).unwrap();
        let shown = format!("{keys:?} {:?} {:#?}", keys.check(ALICE), keys.check(BOB));
        assert!(shown.contains("alice") && shown.contains("bob"));
        let hashes = [ALICE, BOB].map(|key| blake3::hash(key.as_bytes()).to_hex().to_string());
        for hidden in [ALICE, BOB, &hashes[0], &hashes[1], "0123456789"] {
            assert!(!shown.contains(hidden), "{shown}");
        }
    }

    #[test]
    fn errors_name_file_and_line_and_never_the_key() {
        let long = "n".repeat(65);
        for (text, line, reason) in [
            (format!("alice {ALICE}\n\n{BOB}\n"), 3, "expected NAME KEY"),
            (format!("alice #{ALICE}"), 1, "expected NAME KEY"),
            (format!("{BOB} bob"), 1, "the name (first word)"),
            (format!("{long} {ALICE}"), 1, "the name (first word)"),
            (format!("ä {ALICE}"), 1, "the name (first word)"),
            (format!("a {ALICE}\n# \na {BOB}"), 3, "has the same name as line 1"),
            (format!("a {ALICE}\nb {ALICE}"), 2, "has the same key as line 1"),
            ("a 0123456789abcde".into(), 1, "has 15 characters"),
            (format!("a {ALICE}ä"), 1, "printable ASCII"),
            (format!("a {ALICE}\u{7f}"), 1, "printable ASCII"),
            (format!("a {ALICE} {BOB}"), 1, "expected budget=AMOUNT"),
            (format!("a {ALICE} budget=1 {BOB}"), 1, "expected budget=AMOUNT"),
            (format!("a {ALICE} budget={BOB}"), 1, "the budget expected a decimal number"),
            (format!("a {ALICE} budget=-1"), 1, "the budget expected a decimal number"),
            (format!("a {ALICE} budget=1.0000000000001"), 1, "the budget has more than 12 decimals"),
        ] {
            let (_dir, path) = file(&text);
            let error = Keys::load(&path).unwrap_err().to_string();
            assert!(error.starts_with(&format!("{}:{line}: ", path.display())), "{error}");
            assert!(error.contains(reason), "{error}, not {reason}");
            for hidden in ["0123456789", "alice", "bob"] {
                assert!(!error.contains(hidden), "{error}");
            }
        }
        let (_dir, path) = file(b"a sk-\xff\xff0123456789abcdef");
        assert!(Keys::load(&path).unwrap_err().to_string().ends_with(":1: is not UTF-8"));
    }

    #[test]
    fn a_file_without_keys_is_refused() {
        for text in ["", "\n\n", "# alice sk-alice-0123456789abcdef"] {
            let (_dir, path) = file(text);
            assert!(matches!(Keys::load(&path), Err(KeyError::Empty { .. })), "{text:?}");
        }
        let (dir, path) = file("x".repeat(MAX_FILE as usize + 1));
        assert!(matches!(Keys::load(&path), Err(KeyError::TooLarge { .. })));
        assert!(matches!(Keys::load(dir.path()), Err(KeyError::Read { .. })));
        assert!(matches!(Keys::load(&dir.path().join("none")), Err(KeyError::Read { .. })));
    }

    #[cfg(unix)]
    #[test]
    fn warns_of_a_file_that_all_can_read() {
        use std::os::unix::fs::PermissionsExt;
        let (_dir, path) = file(format!("a {ALICE}"));
        for (mode, warns) in [(0o644, true), (0o600, false), (0o440, false)] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(Keys::load(&path).unwrap().warning().is_some(), warns, "{mode:o}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_keys_or_an_error(text in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&text);
        }

        #[test]
        fn every_key_is_found_and_no_other(
            entries in proptest::collection::btree_map("[A-Za-z0-9_.-]{1,64}", "[!-\"$-~][!-~]{15,40}", 1..8),
            other in "[!-~]{16,40}",
        ) {
            let distinct: std::collections::BTreeSet<_> = entries.values().collect();
            prop_assume!(distinct.len() == entries.len());
            let lines: Vec<String> = entries.iter().map(|(name, key)| format!("{name} {key}")).collect();
            let keys = Keys { all: parse(lines.join("\n").as_bytes()).unwrap(), open: false, warning: None };
            for (name, key) in &entries {
                prop_assert_eq!(keys.check(key).map(Key::name), Some(name.as_str()));
            }
            prop_assert_eq!(keys.check(&other).is_some(), distinct.contains(&other));
        }
    }
}
