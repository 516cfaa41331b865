//! Clients that other people made, against a running server: OpenAI's own for Python, and the AI SDK's provider of DeepSeek for
//! Node.js. They are installed, in the versions that `clients/` names, when this is first run; without Python, Node.js or a
//! network these tests fail.

#[path = "common/cli.rs"]
#[allow(unused_imports)] // its macro is for other tests
mod cli;
#[path = "serve/mod.rs"]
mod harness;
#[path = "data/serve/model.rs"]
mod model;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use harness::Server;

const KEY: &str = "sk-drop-in-0123456789abcdef";

/// A server of the model with everything, with keys and prices.
fn server() -> &'static Server {
    static SERVER: OnceLock<Server> = OnceLock::new();
    SERVER.get_or_init(|| {
        let dir = cli::root().join("everything");
        std::fs::create_dir_all(&dir).unwrap();
        model::write_model(&cli::demo(), &dir);
        let keys = cli::root().join("keys.txt");
        std::fs::write(&keys, format!("# NAME KEY\ntester {KEY}\n")).unwrap();
        let prices = ["--price-input", "0.5", "--price-cache-hit", "0.1", "--price-output", "2"];
        let args = [&["--api-key-file", keys.to_str().unwrap()], &prices[..]].concat();
        // It is never dropped, so a shell ends it when this process is gone, which closes its input.
        Server::begin(Some(r#""$@" <&- & cat; kill -9 $!"#), &dir, &args).ready()
    })
}

/// A directory that outlives the test, for what is installed.
fn installed() -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("clients");
    std::fs::create_dir_all(&dir).unwrap();
    dir
}

fn clients() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients")
}

fn run(command: &mut Command) -> Output {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?} cannot be started: {error}"));
    let said = [&output.stdout[..], &output.stderr[..]].map(String::from_utf8_lossy).concat();
    assert!(output.status.success(), "{command:?}: {}\n{said}\nserver: {}", output.status, server().stderr());
    println!("{said}");
    output
}

/// What a client printed: a line for each part.
fn parts(output: &Output) -> usize {
    String::from_utf8_lossy(&output.stdout).lines().filter(|line| line.starts_with("ok ")).count()
}

#[test]
fn openai_for_python() {
    let venv = installed().join("venv");
    let python = venv.join("bin/python");
    if !python.exists() {
        run(Command::new("python3").args(["-m", "venv"]).arg(&venv));
    }
    let quiet = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r"];
    run(Command::new(&python).args(quiet).arg(clients().join("requirements.txt")));
    let url = format!("http://{}", server().address);
    let output = run(Command::new(&python).arg(clients().join("openai_client.py")).args([&url, KEY, "everything"]));
    assert_eq!(parts(&output), 15);
}

#[test]
fn deepseek_for_node() {
    let dir = installed().join("node");
    std::fs::create_dir_all(&dir).unwrap();
    for name in ["package.json", "deepseek_client.mjs"] {
        std::fs::copy(clients().join(name), dir.join(name)).unwrap();
    }
    run(Command::new("npm")
        .args(["install", "--no-package-lock", "--no-audit", "--no-fund", "--silent"])
        .current_dir(&dir));
    let url = format!("http://{}", server().address);
    let output = run(Command::new("node").arg("deepseek_client.mjs").args([&url, KEY, "everything"]).current_dir(&dir));
    assert_eq!(parts(&output), 7);
}
