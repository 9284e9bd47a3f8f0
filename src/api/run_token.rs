//! The API for a trainer, which holds a token of its own run instead of the admin token.
//!
//! The daemon writes a [`RunToken`] to the run's folder when it starts the trainer, and accepts it
//! only while that trainer runs. [`model::policy`] decides what its holder may do.

use std::fmt;

use rand::TryRngCore;

use super::ApiToken;
use super::proof::ProofQuery;
use super::routes::App;
use base::fault::Fault;
use base::names::RunName;

/// The prefix of a token.
const PREFIX: &str = "run.";
/// Random bytes of a token.
const SECRET_BYTES: usize = 32;

/// A token that is valid for one training run: `run.<RUN>.<64 hex digits>`.
#[derive(Clone)]
pub struct RunToken {
    run: RunName,
    secret: [u8; SECRET_BYTES],
}

impl fmt::Debug for RunToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RunToken({}, …)", self.run)
    }
}

impl RunToken {
    /// A new one.
    pub fn new(run: RunName) -> Result<Self, Fault> {
        let mut secret = [0; SECRET_BYTES];
        rand::rngs::OsRng
            .try_fill_bytes(&mut secret)
            .map_err(|e| Fault::internal(format!("no random bits from the system: {e}")))?;
        Ok(Self { run, secret })
    }

    /// Parses a token.
    pub fn parse(text: &[u8]) -> Option<Self> {
        let (run, secret) = std::str::from_utf8(text)
            .ok()?
            .strip_prefix(PREFIX)?
            .rsplit_once('.')?;
        let mut bytes = [0; SECRET_BYTES];
        hex::decode_to_slice(secret, &mut bytes).ok()?;
        Some(Self {
            run: run.parse().ok()?,
            secret: bytes,
        })
    }

    /// The text, for the file and for a request's header.
    pub fn text(&self) -> String {
        format!("{PREFIX}{}.{}", self.run, hex::encode(self.secret))
    }

    /// Its run.
    pub fn run(&self) -> &RunName {
        &self.run
    }

    /// Whether both are the same token. Hashes are compared, in constant time.
    pub fn is(&self, other: &Self) -> bool {
        self.run == other.run && blake3::hash(&self.secret) == blake3::hash(&other.secret)
    }
}

/// The run whose trainer presents this token, if it runs here now.
pub(super) async fn run_of(app: &App, presented: &[u8]) -> Option<RunName> {
    let presented = RunToken::parse(presented)?;
    let own = app.backend.run_token(presented.run()).await?;
    own.is(&presented).then_some(presented.run)
}

/// The trainer's token that a client requests a proof of.
pub(super) async fn of_query(app: &App, query: &ProofQuery) -> Option<ApiToken> {
    let token = app
        .backend
        .run_token(&query.run.as_ref()?.parse().ok()?)
        .await?;
    ApiToken::parse(&token.text()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_good_for_its_run_only() {
        let run: RunName = "line3.v7".parse().unwrap();
        let token = RunToken::new(run.clone()).unwrap();
        let again = RunToken::parse(token.text().as_bytes()).unwrap();
        assert!(token.is(&again) && *again.run() == run);
        assert!(!token.is(&RunToken::new(run).unwrap()));
        assert!(!token.is(&RunToken {
            run: "other".parse().unwrap(),
            ..token.clone()
        }));
        assert!(!format!("{token:?}").contains(&token.text()));
        for bad in [
            "",
            "run.",
            "run.x",
            "run.x.00",
            &token.text()[1..],
            &format!("{}00", token.text()),
            "run.../x.00",
        ] {
            assert!(RunToken::parse(bad.as_bytes()).is_none(), "{bad}");
        }
    }
}
