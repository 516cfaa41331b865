//! Reads the small text files of a model directory, bounded and named in every error.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::TextError;

/// Reads a whole file of at most `limit` bytes; `None` if there is no such file.
pub fn read(file: &Path, limit: u64) -> Result<Option<Vec<u8>>, TextError> {
    let failed = |source| TextError::Read { file: file.to_owned(), source };
    // Asked before opening: opening a pipe would wait for a writer.
    let meta = match std::fs::metadata(file) {
        Ok(meta) => meta,
        Err(e) if e.kind() == ErrorKind::NotFound && file.symlink_metadata().is_err() => return Ok(None),
        Err(e) => return Err(failed(e)),
    };
    if !meta.is_file() {
        return Err(TextError::NotAFile { file: file.to_owned() });
    }
    let too_large = |found| TextError::TooLarge { file: file.to_owned(), found, limit };
    if meta.len() > limit {
        return Err(too_large(meta.len()));
    }
    let mut bytes = Vec::with_capacity(meta.len() as usize);
    // The file may grow between the question and the answer.
    File::open(file).map_err(failed)?.take(limit + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > limit {
        return Err(too_large(bytes.len() as u64));
    }
    Ok(Some(bytes))
}

/// Reads a whole UTF-8 file.
pub fn read_text(file: &Path, limit: u64) -> Result<Option<String>, TextError> {
    let Some(bytes) = read(file, limit)? else { return Ok(None) };
    match String::from_utf8(bytes) {
        Ok(text) => Ok(Some(text)),
        Err(e) => Err(TextError::NotUtf8 { file: file.to_owned(), offset: e.utf8_error().valid_up_to() }),
    }
}

/// A JSON object read from a file, whose fields are read with errors that name file and field.
///
/// A field that is `null` counts as absent, as in the Hugging Face libraries.
pub struct JsonFile {
    file: PathBuf,
    fields: Map<String, Value>,
}

impl JsonFile {
    /// Reads and parses a file; `None` if there is no such file.
    pub fn load(file: &Path, limit: u64) -> Result<Option<Self>, TextError> {
        let Some(bytes) = read(file, limit)? else { return Ok(None) };
        let value =
            serde_json::from_slice(&bytes).map_err(|source| TextError::Json { file: file.to_owned(), source })?;
        match value {
            Value::Object(fields) => Ok(Some(Self { file: file.to_owned(), fields })),
            other => Err(TextError::Field {
                file: file.to_owned(),
                field: "(the whole file)".to_owned(),
                found: shorten(&other),
                expected: "an object",
            }),
        }
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.file
    }

    /// A field's value, unless it is absent or null.
    pub fn get(&self, field: &str) -> Option<&Value> {
        self.fields.get(field).filter(|value| !value.is_null())
    }

    /// A field's value through `parse`, which gives `None` for a value that is not `expected`.
    pub fn parse<T>(
        &self,
        field: &str,
        expected: &'static str,
        parse: impl FnOnce(&Value) -> Option<T>,
    ) -> Result<Option<T>, TextError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        parse(value).map(Some).ok_or_else(|| self.wrong(field, value, expected))
    }

    /// The error for a field with a wrong value.
    pub fn wrong(&self, field: &str, value: &Value, expected: &'static str) -> TextError {
        TextError::Field { file: self.file.clone(), field: field.to_owned(), found: shorten(value), expected }
    }
}

/// A value for an error message: whole if short, else its beginning.
pub fn shorten(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}
