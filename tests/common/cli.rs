//! Running the program as its user does: arguments in; exit code, output and files out.
#![allow(dead_code)] // each test binary uses its own part of this

use std::ffi::OsString;
use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use serde_json::{Map, Value};

/// Nothing that is tested here takes so long, however busy the machine is.
const PATIENCE: Duration = Duration::from_mins(2);

/// The program under test.
pub const MOEWE: &str = env!("CARGO_BIN_EXE_moewe");

/// A call of the program: `moewe!["run", &dir, "--tokens", "1"]`.
macro_rules! moewe {
    ($($arg:expr),* $(,)?) => {
        $crate::cli::Call::new(vec![$(AsRef::<std::ffi::OsStr>::as_ref(&$arg).to_owned()),*])
    };
}
pub(crate) use moewe;

/// A call that has not begun.
pub struct Call {
    args: Vec<OsString>,
    env: Vec<(&'static str, OsString)>,
    script: Option<String>,
    stdin: Vec<u8>,
}

/// What a call said.
#[derive(Debug)]
pub struct Said {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Call {
    pub fn new(args: Vec<OsString>) -> Self {
        Self { args, env: Vec::new(), script: None, stdin: Vec::new() }
    }

    pub fn env(mut self, name: &'static str, value: impl Into<OsString>) -> Self {
        self.env.push((name, value.into()));
        self
    }

    /// Text on standard input.
    pub fn stdin(mut self, text: impl AsRef<[u8]>) -> Self {
        self.stdin = text.as_ref().to_vec();
        self
    }

    /// A line of shell that comes first; `"$@"` in it is the program and its arguments.
    pub fn through(mut self, script: &str) -> Self {
        self.script = Some(script.to_owned());
        self
    }

    /// Begins, with pipes at all three ends.
    pub fn spawn(&self) -> Child {
        let mut command = match &self.script {
            None => Command::new(MOEWE),
            Some(script) => {
                let mut shell = Command::new("sh");
                shell.args(["-c", script, "sh", MOEWE]);
                shell
            }
        };
        command.args(&self.args).env("MOEWE_CACHE", root().join("cache")).env_remove("COLUMNS").env("NO_COLOR", "1");
        command.envs(self.env.iter().map(|(name, value)| (name, value)));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().expect("the program starts")
    }

    /// Runs it to its end.
    pub fn run(self) -> Said {
        let mut child = self.spawn();
        let stdin = child.stdin.take();
        let input = self.stdin.clone();
        // The program need not read it.
        std::thread::spawn(move || stdin.map(|mut stdin| stdin.write_all(&input)));
        let said = finish(child);
        assert!(!said.stderr.contains("panicked"), "{self:?}: {said:?}");
        said
    }

    /// Runs it; it must succeed.
    pub fn ok(self) -> Said {
        let args = format!("{self:?}");
        let said = self.run();
        assert_eq!(said.code, Some(0), "{args}: {said:?}");
        said
    }

    /// Runs it; it must succeed and print JSON.
    pub fn json(self) -> Value {
        let said = self.ok();
        serde_json::from_str(&said.stdout).unwrap_or_else(|error| panic!("{error}: {said:?}"))
    }

    /// Runs it; it must fail with this code and say why in one line that holds `words`. Returns the line.
    pub fn refused(self, code: i32, words: &[&str]) -> String {
        let args = format!("{self:?}");
        let said = self.run();
        assert_eq!(said.code, Some(code), "{args}: {said:?}");
        let lines = said.stderr.lines().filter(|line| !line.starts_with("moewe: warning: "));
        let lines: Vec<&str> = lines.collect();
        let [line] = lines[..] else { panic!("{args}: not one line: {said:?}") };
        let sentence = line.strip_prefix("moewe: ").unwrap_or_else(|| panic!("{args}: {line}"));
        assert!(sentence.len() < 900, "{args}: {line}");
        for word in words {
            assert!(sentence.contains(word), "{args}: {word:?} is not in: {line}");
        }
        sentence.to_owned()
    }
}

impl std::fmt::Debug for Call {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "moewe {}", self.args.iter().map(|arg| arg.to_string_lossy()).collect::<Vec<_>>().join(" "))
    }
}

/// Waits for a child and reads what it says.
pub fn finish(mut child: Child) -> Said {
    let read = |pipe: Option<Box<dyn Read + Send>>| {
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            pipe.map(|mut pipe| pipe.read_to_end(&mut bytes));
            String::from_utf8_lossy(&bytes).into_owned()
        })
    };
    let stdout = read(child.stdout.take().map(|pipe| Box::new(pipe) as _));
    let stderr = read(child.stderr.take().map(|pipe| Box::new(pipe) as _));
    let begun = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if begun.elapsed() > PATIENCE {
            child.kill().unwrap();
            panic!("it hangs: {:?} {:?}", stdout.join(), stderr.join());
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    Said { code: status.code(), stdout: stdout.join().unwrap(), stderr: stderr.join().unwrap() }
}

/// Ctrl-C.
pub fn interrupt(child: &Child) {
    let killed = Command::new("sh").args(["-c", &format!("kill -INT {}", child.id())]).status().unwrap();
    assert!(killed.success());
}

/// A directory for what the tests of this process share. Those of processes that are gone are removed.
pub fn root() -> &'static Path {
    static ROOT: OnceLock<PathBuf> = OnceLock::new();
    ROOT.get_or_init(|| {
        let parent = Path::new(env!("CARGO_TARGET_TMPDIR"));
        fs::create_dir_all(parent).unwrap();
        for entry in fs::read_dir(parent).unwrap().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.strip_prefix("cli-").is_some_and(|id| !Path::new("/proc").join(id).exists()) {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
        let root = parent.join(format!("cli-{}", std::process::id()));
        fs::create_dir_all(root.join("cache")).unwrap();
        root
    })
}

/// A checkpoint with golden files.
pub fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

/// The demo model.
pub fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/demo")
}

/// A bundle of `v3-tiny` for the software driver.
pub fn tiny_bundle() -> &'static Path {
    static BUNDLE: OnceLock<PathBuf> = OnceLock::new();
    BUNDLE.get_or_init(|| {
        let bundle = root().join("v3-tiny.moewe");
        moewe!["compile", golden("v3-tiny"), "-o", &bundle, "--target", "lavapipe"].ok();
        bundle
    })
}

/// Copies the files of a directory and of the directories in it, `golden` left out.
pub fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let target = to.join(path.file_name().unwrap());
        if !path.is_dir() {
            fs::write(target, fs::read(path).unwrap()).unwrap();
        } else if !path.ends_with("golden") {
            copy(&path, &target);
        }
    }
}

/// Everything below a directory, with the length of files.
pub fn listing(dir: &Path) -> Vec<(PathBuf, u64)> {
    let mut all = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let meta = entry.path().symlink_metadata().unwrap();
        all.push((entry.path(), if meta.is_file() { meta.len() } else { 0 }));
        if meta.is_dir() {
            all.extend(listing(&entry.path()));
        }
    }
    all.sort();
    all
}

/// Reads a JSON file.
pub fn read_json(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

/// Changes a JSON file.
pub fn edit_json(path: &Path, edit: impl FnOnce(&mut Value)) {
    let mut value = read_json(path);
    edit(&mut value);
    fs::write(path, value.to_string()).unwrap();
}

/// A safetensors file as its two parts, so that tests can put them together wrongly.
pub struct Parts {
    pub header: Map<String, Value>,
    pub data: Vec<u8>,
}

impl Parts {
    pub fn read(path: &Path) -> Self {
        let bytes = fs::read(path).unwrap();
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let header = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
        Self { header, data: bytes[8 + length..].to_vec() }
    }

    pub fn write(&self, path: &Path) {
        let header = serde_json::to_vec(&self.header).unwrap();
        fs::write(path, [&(header.len() as u64).to_le_bytes()[..], &header, &self.data].concat()).unwrap();
    }

    /// Where the bytes of a tensor are.
    pub fn range(&self, tensor: &str) -> std::ops::Range<usize> {
        let at = |i: usize| self.header[tensor]["data_offsets"][i].as_u64().unwrap() as usize;
        at(0)..at(1)
    }

    /// Takes a tensor away, and its bytes.
    pub fn remove(&mut self, tensor: &str) {
        let gone = self.range(tensor);
        self.data.drain(gone.clone());
        self.header.shift_remove(tensor);
        for entry in self.header.values_mut() {
            for offset in entry["data_offsets"].as_array_mut().into_iter().flatten() {
                let at = offset.as_u64().unwrap();
                if at >= gone.end as u64 {
                    *offset = (at - gone.len() as u64).into();
                }
            }
        }
    }
}

/// Makes the manifest of a bundle agree with its files again, as somebody who damages bundles on purpose would.
pub fn reseal(bundle: &Path) {
    edit_json(&bundle.join("manifest.json"), |manifest| {
        for (name, entry) in manifest["files"].as_object_mut().unwrap() {
            let bytes = fs::read(bundle.join(name)).unwrap();
            entry["bytes"] = bytes.len().into();
            entry["blake3"] = moewe_plan::hash_file(&bytes).into();
        }
        let files = serde_json::to_vec(&manifest["files"]).unwrap();
        manifest["blake3"] = moewe_plan::hash_file(&files).into();
    });
}

/// Makes a named pipe.
pub fn pipe(path: &Path) {
    let _ = fs::remove_file(path);
    assert!(Command::new("mkfifo").arg(path).status().unwrap().success());
}
