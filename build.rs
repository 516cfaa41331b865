//! Hashes the sources of the compiler and the kernels, so that bundles cached by another build are not reused.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::Path;

fn main() {
    let mut hasher = DefaultHasher::new();
    for dir in ["compiler/src", "compiler/profiles", "shaders/src", "shaders/wesl", "plan/src"] {
        println!("cargo:rerun-if-changed={dir}");
        add(Path::new(dir), &mut hasher);
    }
    println!("cargo:rustc-env=MOEWE_BUILD={:016x}", hasher.finish());
}

fn add(path: &Path, hasher: &mut DefaultHasher) {
    if path.is_dir() {
        let mut entries: Vec<_> = std::fs::read_dir(path).expect("sources are readable").flatten().collect();
        entries.sort_by_key(std::fs::DirEntry::path);
        for entry in entries {
            add(&entry.path(), hasher);
        }
    } else {
        path.hash(hasher);
        std::fs::read(path).expect("sources are readable").hash(hasher);
    }
}
