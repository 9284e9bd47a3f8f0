//! The messages of a join and what they carry, parsed as the two ends parse them; for fuzzing.

use base::fault::Fault;

use crate::hello::{self, Answer, Ask, Welcome};
use crate::identity::{
    JoinToken, fingerprint, holder, key_hash, read_csr, validity, verify_signature,
};

/// Parses an input. `which` says what it is: a welcome, a join request, its answer, a token, a
/// certificate request or a certificate.
pub fn parse_join(which: u8, bytes: &[u8]) -> Result<(), Fault> {
    match which % 6 {
        0 => hello::parse::<Welcome>(bytes).map(drop),
        1 => hello::parse::<Ask>(bytes)?.read().map(drop),
        2 => match hello::parse(bytes)? {
            Answer::Certificate(text) => certificate(&hello::decode(&text)?),
            Answer::Refused(fault) => Err(fault),
        },
        3 => {
            let token: JoinToken = String::from_utf8_lossy(bytes).parse()?;
            assert_eq!(token.to_string().parse::<JoinToken>().as_ref(), Ok(&token));
            Ok(())
        }
        4 => read_csr(bytes).map(|request| assert_eq!(key_hash(&request), key_hash(&request))),
        _ => certificate(bytes),
    }
}

fn certificate(der: &[u8]) -> Result<(), Fault> {
    assert_eq!(fingerprint(der), fingerprint(der));
    let name = holder(der).map(|holder| holder.name().to_owned());
    validity(der)?;
    assert!(verify_signature(der, b"a message", &[0; 64]).is_err());
    name.map(drop)
}
