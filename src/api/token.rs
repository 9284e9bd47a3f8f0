//! The admin token: 256 random bits that the daemon writes to its state folder at its first start
//! and the command line reads.

use std::fmt;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::RwLock;
use rand::TryRngCore;

use base::durable;
use base::fault::{Code, Fault};

/// The token that the API requires in every request. Its clones are one token: [`ApiToken::reload`]
/// changes it for all.
#[derive(Clone)]
pub struct ApiToken(Arc<RwLock<Arc<str>>>);

impl fmt::Debug for ApiToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ApiToken(…)")
    }
}

impl ApiToken {
    /// The path of the token of the daemon with this state folder.
    pub fn path(data_dir: &Path) -> PathBuf {
        data_dir.join("api-token")
    }

    /// The daemon's token; created at the first start, durable and with mode 0600 before its first
    /// use. A file that was read and holds no token is replaced: no client could use it.
    pub fn open_or_create(data_dir: &Path) -> Result<Self, Fault> {
        let path = Self::path(data_dir);
        match Self::read(&path) {
            Err(fault) if fault.code == Code::NotFound => {}
            Err(_) if is_readable(&path) => {
                tracing::warn!(file = %path.display(), "the API token was damaged; the daemon has a new one: give it to the programs that had the old one");
            }
            other => return other,
        }
        Self::create(&path)
    }

    fn create(path: &Path) -> Result<Self, Fault> {
        let mut bits = [0; 32];
        rand::rngs::OsRng
            .try_fill_bytes(&mut bits)
            .map_err(|e| Fault::internal(format!("no random bits from the system: {e}")))?;
        let token = hex::encode(bits);
        durable::replace_secret(path, format!("{token}\n").as_bytes())?;
        Self::parse(&token)
    }

    /// Reads a token from its file.
    pub fn read(path: &Path) -> Result<Self, Fault> {
        Self::parse(&crate::config::read_secret(path)?).map_err(|f| f.context(path.display()))
    }

    /// Parses a token: valid in a header, and at least 128 bits in hex.
    pub fn parse(text: &str) -> Result<Self, Fault> {
        if text.len() < 32 || text.len() > 512 || !text.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(Fault::not_allowed("this is not an API token")
                .with_next("give the file that the daemon wrote: <data_dir>/api-token"));
        }
        Ok(Self(Arc::new(RwLock::new(text.into()))))
    }

    /// The text, for a request's header.
    pub fn secret(&self) -> Arc<str> {
        self.0.read().clone()
    }

    /// Reads the token of the daemon with this state folder again. If the file is gone, a new token
    /// is created. Returns whether it is another one now.
    pub fn reload(&self, data_dir: &Path) -> Result<bool, Fault> {
        let path = Self::path(data_dir);
        let new = match Self::read(&path) {
            Err(fault) if fault.code == Code::NotFound => Self::create(&path),
            other => other,
        }?
        .secret();
        let mut current = self.0.write();
        let is_other = *current != new;
        *current = new;
        Ok(is_other)
    }

    /// Whether this is the token. Hashes are compared in constant time, so the duration reveals
    /// nothing about it.
    pub fn is(&self, presented: &[u8]) -> bool {
        blake3::hash(self.secret().as_bytes()) == blake3::hash(presented)
    }
}

/// Whether this is a regular file whose start can be read.
fn is_readable(path: &Path) -> bool {
    let is_file = std::fs::metadata(path).is_ok_and(|meta| meta.is_file());
    let reads = |file: std::fs::File| std::io::copy(&mut file.take(4096), &mut std::io::sink());
    is_file && std::fs::File::open(path).and_then(reads).is_ok()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn made_once_and_for_the_owner_only() {
        let dir = tempfile::tempdir().unwrap();
        let first = ApiToken::open_or_create(dir.path()).unwrap();
        let again = ApiToken::open_or_create(dir.path()).unwrap();
        assert_eq!(first.secret(), again.secret());
        assert_eq!(first.secret().len(), 64);
        let mode = std::fs::metadata(ApiToken::path(dir.path()))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(
            first.is(again.secret().as_bytes())
                && !first.is(b"")
                && !first.is(&again.secret().as_bytes()[..63])
        );
        assert!(!format!("{first:?}").contains(&*first.secret()));
        // A file that cannot be used changes nothing; one that is gone is made anew.
        let old = first.secret();
        durable::replace(&ApiToken::path(dir.path()), b"short").unwrap();
        first.reload(dir.path()).unwrap_err();
        assert_eq!(first.secret(), old);
        std::fs::remove_file(ApiToken::path(dir.path())).unwrap();
        let clone = first.clone();
        let reload = move || clone.reload(dir.path()).unwrap();
        assert!(reload());
        assert!(!first.is(old.as_bytes()) && !reload());
    }

    #[test]
    fn a_damaged_token_is_replaced_at_the_start() {
        let dir = tempfile::tempdir().unwrap();
        let path = ApiToken::path(dir.path());
        for damaged in [
            &b"\xff\xfe\0binary"[..],
            b"",
            b"short",
            &b"a".repeat(1 << 20),
        ] {
            durable::replace(&path, damaged).unwrap();
            let token = ApiToken::open_or_create(dir.path()).unwrap();
            assert_eq!(token.secret(), ApiToken::read(&path).unwrap().secret());
            assert_eq!(token.secret().len(), 64);
        }
        std::fs::remove_file(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
        ApiToken::open_or_create(dir.path()).unwrap_err();
    }
}
