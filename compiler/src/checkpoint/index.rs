//! `model.safetensors.index.json`: which shard holds which tensor.

use std::{
    collections::BTreeMap,
    fmt,
    path::{Component, Path},
};

use serde::{
    Deserialize, Deserializer,
    de::{Error as _, MapAccess, Visitor},
};

use crate::{
    config::read_text,
    error::{Error, Result, clip},
};

/// Largest index in bytes; DeepSeek-V3's has 9 MB.
const MAX_INDEX: u64 = 1 << 30;

/// Reads the index: tensor name → shard file name, each a plain name inside the checkpoint directory.
pub(super) fn read(path: &Path) -> Result<BTreeMap<String, String>> {
    let bad = |detail: String| Error::Index { path: path.to_owned(), detail };
    let Index { weight_map: WeightMap(map) } =
        serde_json::from_str(&read_text(path, MAX_INDEX)?).map_err(|e| bad(clip(&e.to_string())))?;
    if map.is_empty() {
        return Err(bad("`weight_map` names no tensor".into()));
    }
    for (tensor, file) in &map {
        let mut parts = Path::new(file).components();
        let plain = matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None));
        if !plain || file.contains(['/', '\\', '\0']) {
            return Err(bad(format!(
                "tensor `{}` is said to be in \"{}\", which is not a file name inside the checkpoint directory",
                clip(tensor),
                clip(file)
            )));
        }
    }
    Ok(map)
}

#[derive(Deserialize)]
struct Index {
    weight_map: WeightMap,
}

/// A map whose reader refuses repeated names.
struct WeightMap(BTreeMap<String, String>);

impl<'de> Deserialize<'de> for WeightMap {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Pairs;
        impl<'de> Visitor<'de> for Pairs {
            type Value = WeightMap;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensor names and file names")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<WeightMap, A::Error> {
                let mut out = BTreeMap::new();
                while let Some((name, file)) = map.next_entry::<String, String>()? {
                    if out.contains_key(&name) {
                        return Err(A::Error::custom(format!("tensor `{}` occurs twice", clip(&name))));
                    }
                    out.insert(name, file);
                }
                Ok(WeightMap(out))
            }
        }
        deserializer.deserialize_map(Pairs)
    }
}
