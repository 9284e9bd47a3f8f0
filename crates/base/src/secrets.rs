//! Secrets that a file holds: passwords are read when they are needed, and never kept in a
//! configuration.

use std::path::Path;

use crate::durable;
use crate::fault::{Fault, IoContext};
use crate::limits::SECRET_BYTES_MAX;

/// Reads a secret from its file, without the line end that editors leave behind. An empty one is
/// refused: it is always a mistake, and a server's answer to it says nothing of the file.
pub fn read_secret(path: &Path) -> Result<String, Fault> {
    let unread = || format!("cannot read the file {}", path.display());
    let meta = std::fs::metadata(path).at(unread())?;
    if !meta.is_file() {
        return Err(Fault::config(format!(
            "{} is not a regular file",
            path.display()
        )));
    }
    if meta.len() > SECRET_BYTES_MAX {
        return Err(Fault::config(format!(
            "{} has {} bytes; a secret has at most {SECRET_BYTES_MAX}",
            path.display(),
            meta.len()
        )));
    }
    let text = durable::read_regular_text(path, SECRET_BYTES_MAX).at(unread())?;
    let secret = text.trim_end_matches(['\r', '\n']);
    if secret.is_empty() {
        return Err(Fault::config(format!("{} is empty", path.display())));
    }
    Ok(secret.into())
}
