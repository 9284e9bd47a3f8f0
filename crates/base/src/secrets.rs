//! Secrets in files. A password is read when it is needed and never stored in a configuration.

use std::path::Path;

use crate::durable;
use crate::fault::{Fault, IoContext};
use crate::limits::SECRET_BYTES_MAX;

/// Reads a secret from its file and removes the line end that editors add. An empty secret is an
/// error: it is always a mistake, and the error of the server would not mention the file.
pub fn read_secret(path: &Path) -> Result<String, Fault> {
    let operation = || format!("cannot read the file {}", path.display());
    let meta = std::fs::metadata(path).at(operation())?;
    if !meta.is_file() {
        return Err(Fault::config(format!(
            "{} is not a regular file",
            path.display()
        )));
    }
    if meta.len() > SECRET_BYTES_MAX {
        return Err(Fault::config(format!(
            "{} has {} bytes; a secret may have at most {SECRET_BYTES_MAX}",
            path.display(),
            meta.len()
        )));
    }
    let text = durable::read_regular_text(path, SECRET_BYTES_MAX).at(operation())?;
    let secret = text.trim_end_matches(['\r', '\n']);
    if secret.is_empty() {
        return Err(Fault::config(format!("{} is empty", path.display())));
    }
    Ok(secret.into())
}
