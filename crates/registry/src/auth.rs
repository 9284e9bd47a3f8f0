//! Authentication at a registry: credentials, the challenge of the registry, and tokens.
//!
//! The challenge is requested once. Tokens are kept per scope until shortly before they expire, so
//! that a large body is not sent and then rejected. After a 401, the challenge, the secret file and
//! the token are read again, once. No secret is stored or printed.

use std::collections::HashMap;
use std::fmt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use parking_lot::Mutex;
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue, WWW_AUTHENTICATE};
use serde::Deserialize;

use crate::Settings;
use crate::answer::{Answer, Error, authority, is_html, no_answer};
use crate::reference::Origin;
use base::blocking::blocking;
use base::durable;
use base::fault::Fault;
use base::limits;

/// The lifetime of a token without a stated lifetime, according to the token specification.
const TOKEN_LIFE_DEFAULT: Duration = Duration::from_secs(60);

/// A user name and a secret. `Debug` prints neither.
#[derive(Clone)]
pub struct Credentials {
    username: String,
    secret: Secret,
    /// Hosts other than the registry to which the password may be sent.
    realm_hosts: Vec<String>,
}

#[derive(Clone)]
enum Secret {
    Text(String),
    File(PathBuf),
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Credentials(..)")
    }
}

impl Credentials {
    /// Creates credentials from a password.
    pub fn new(username: impl Into<String>, password: impl Into<String>) -> Self {
        Self {
            username: username.into(),
            secret: Secret::Text(password.into()),
            realm_hosts: Vec::new(),
        }
    }

    /// Creates credentials from a password file, which must be readable now. The file is read
    /// whenever the password is needed, so a new password is used without a restart.
    pub fn from_file(username: impl Into<String>, path: PathBuf) -> Result<Self, Fault> {
        durable::open_regular(&path).map_err(|e| {
            Fault::config(format!(
                "read the registry's password file {}: {e}",
                path.display()
            ))
        })?;
        Ok(Self {
            username: username.into(),
            secret: Secret::File(path),
            realm_hosts: Vec::new(),
        })
    }

    /// Creates credentials from the two keys of the configuration.
    pub fn from_config(
        username: Option<&str>,
        password_file: Option<&PathBuf>,
    ) -> Result<Option<Self>, Fault> {
        match (username, password_file) {
            (Some(user), Some(file)) => Self::from_file(user, file.clone()).map(Some),
            (None, None) => Ok(None),
            _ => Err(
                Fault::config("only one of a registry's username and password_file is set")
                    .with_next("set both, or neither"),
            ),
        }
    }

    /// Also allows the password to be sent to these hosts (`HOST` for all ports, or `HOST:PORT`) if
    /// the registry names one of them as its token service.
    #[must_use]
    pub fn with_realm_hosts(self, hosts: &[String]) -> Self {
        Self {
            realm_hosts: hosts.iter().map(|host| host.to_ascii_lowercase()).collect(),
            ..self
        }
    }

    /// Allows the password to be sent only to the registry itself or to a listed host, and never
    /// without TLS if the registry uses TLS.
    fn may_go_to(
        &self,
        url: &reqwest::Url,
        origin: &Origin,
        settings: Settings,
    ) -> Result<(), Fault> {
        if origin.https && url.scheme() != "https" {
            return Err(Fault::not_allowed("the registry asks for the password over plain http at its token service")
                .with_next("correct the registry's external address (Harbor: external_url), so that its token service uses https"));
        }
        let host = url.host_str().unwrap_or_default().to_ascii_lowercase();
        let with_port = format!("{host}:{}", url.port_or_known_default().unwrap_or_default());
        let is_registry = origin.base().parse::<reqwest::Url>().is_ok_and(|own| {
            (own.host_str(), own.port_or_known_default())
                == (url.host_str(), url.port_or_known_default())
        });
        // The token service of Docker Hub has its own host name.
        let is_docker_hub = matches!(
            origin.authority.as_str(),
            "registry-1.docker.io" | "index.docker.io" | "docker.io"
        ) && host == "auth.docker.io";
        if is_registry
            || is_docker_hub
            || self
                .realm_hosts
                .iter()
                .any(|listed| *listed == host || *listed == with_port)
        {
            return Ok(());
        }
        Err(Fault::not_allowed(format!("the registry {origin} asks for its password to be sent to a different host, {with_port}")).with_next(format!(
            "if that is the registry's token service, {}",
            settings.realm_host(&origin.authority, &with_port)
        )))
    }

    /// The user and the password.
    #[cfg(test)]
    pub(crate) fn pair_for_tests(&self) -> (String, String) {
        match &self.secret {
            Secret::Text(text) => (self.username.clone(), text.clone()),
            Secret::File(path) => (self.username.clone(), path.display().to_string()),
        }
    }

    async fn basic(&self) -> Result<HeaderValue, Fault> {
        let password = match &self.secret {
            Secret::Text(text) => text.clone(),
            Secret::File(path) => {
                let file = path.clone();
                let read = blocking(move || {
                    Ok(durable::read_regular_text(&file, limits::SECRET_BYTES_MAX))
                })
                .await?;
                read.map_err(|e| Fault::secret_unreadable(path, &e))?
            }
        };
        let pair = format!(
            "{}:{}",
            self.username,
            password.trim_end_matches(['\r', '\n'])
        );
        sensitive(format!("Basic {}", STANDARD.encode(pair)))
    }
}

fn sensitive(text: String) -> Result<HeaderValue, Fault> {
    let mut value = HeaderValue::try_from(text).map_err(|_| {
        Fault::config("a registry secret contains bytes that are not allowed in an HTTP header")
    })?;
    value.set_sensitive(true);
    Ok(value)
}

/// The requested access, as sent to the token service.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Scope {
    /// Empty if the request concerns no repository.
    pub(super) repository: String,
    /// `pull`, `pull,push` or `pull,push,delete`.
    pub(super) actions: &'static str,
    /// A repository to mount from, which requires permission to pull there.
    pub(super) mount_from: Option<String>,
}

impl Scope {
    fn scopes(&self) -> Vec<String> {
        let mut out = Vec::new();
        if !self.repository.is_empty() {
            out.push(format!("repository:{}:{}", self.repository, self.actions));
        }
        if let Some(from) = &self.mount_from {
            out.push(format!("repository:{from}:pull"));
        }
        out
    }
}

/// The authentication method that a registry requires.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Challenge {
    /// None.
    None,
    /// A password.
    Basic,
    /// A token from a token service.
    Bearer {
        /// The address of the token service.
        realm: String,
        /// The name of the registry at the token service.
        service: String,
    },
}

impl Challenge {
    /// Parses the `WWW-Authenticate` headers. Prefers Bearer over Basic.
    pub(super) fn parse(headers: &HeaderMap) -> Self {
        let mut chosen = Challenge::None;
        for value in headers.get_all(WWW_AUTHENTICATE) {
            for (scheme, parameters) in challenges(value.to_str().unwrap_or_default()) {
                let get = |key: &str| {
                    parameters
                        .iter()
                        .find(|(k, _)| k == key)
                        .map(|(_, v)| v.clone())
                        .unwrap_or_default()
                };
                match scheme.as_str() {
                    "bearer" if !get("realm").is_empty() => {
                        return Challenge::Bearer {
                            realm: get("realm"),
                            service: get("service"),
                        };
                    }
                    "basic" => chosen = Challenge::Basic,
                    _ => {}
                }
            }
        }
        chosen
    }

    /// Whether the challenge comes from Harbor.
    pub(super) fn is_harbor(&self) -> bool {
        matches!(self, Challenge::Bearer { realm, service } if service == "harbor-registry" || realm.ends_with("/service/token"))
    }
}

type Parameters = Vec<(String, String)>;

/// Splits `Scheme k=v, k="v", Other k=v` (RFC 9110, 11.6.1) into schemes with their parameters,
/// both in lower case.
fn challenges(header: &str) -> Vec<(String, Parameters)> {
    let mut out: Vec<(String, Parameters)> = Vec::new();
    let mut rest = header.trim_start_matches([' ', ',']);
    while !rest.is_empty() {
        let end = rest
            .find(|c: char| !(c.is_ascii_alphanumeric() || "-_.".contains(c)))
            .unwrap_or(rest.len());
        let (word, after) = rest.split_at(end);
        if word.is_empty() {
            break; // not of this grammar: keep what was understood
        }
        let word = word.to_ascii_lowercase();
        if let Some(value) = after.trim_start().strip_prefix('=') {
            let value = value.trim_start();
            let (value, after) = match value.strip_prefix('"') {
                Some(quoted) => unquote(quoted),
                None => {
                    let end = value.find([',', ' ']).unwrap_or(value.len());
                    (value[..end].to_owned(), &value[end..])
                }
            };
            if let Some((_, parameters)) = out.last_mut() {
                parameters.push((word, value));
            }
            rest = after;
        } else {
            out.push((word, Vec::new()));
            rest = after;
        }
        rest = rest.trim_start_matches([' ', ',']);
    }
    out
}

fn unquote(text: &str) -> (String, &str) {
    let mut out = String::new();
    let mut escaped = false;
    for (at, c) in text.char_indices() {
        match c {
            _ if escaped => {
                out.push(c);
                escaped = false;
            }
            '\\' => escaped = true,
            '"' => return (out, &text[at + 1..]),
            _ => out.push(c),
        }
    }
    (out, "")
}

/// A token of a registry, ready to be sent.
#[derive(Clone)]
pub(crate) struct Token {
    header: HeaderValue,
    expires: Instant,
}

#[derive(Deserialize)]
struct TokenReply {
    token: Option<String>,
    access_token: Option<String>,
    expires_in: Option<u64>,
}

#[derive(Deserialize)]
struct Claims {
    access: Option<Vec<Access>>,
}

#[derive(Deserialize)]
struct Access {
    #[serde(rename = "type", default)]
    kind: String,
    #[serde(default)]
    name: String,
    actions: Option<Vec<String>>,
}

/// Whether a token grants the requested access. A token service may answer 200 with a token that
/// grants nothing. A token that cannot be decoded is assumed to grant it.
fn grants(token: &str, scope: &Scope) -> bool {
    let claims = token
        .split('.')
        .nth(1)
        .and_then(|part| URL_SAFE_NO_PAD.decode(part.trim_end_matches('=')).ok());
    let Some(claims) = claims.and_then(|bytes| serde_json::from_slice::<Claims>(&bytes).ok())
    else {
        return true;
    };
    let Some(access) = claims.access.filter(|_| !scope.repository.is_empty()) else {
        return true;
    };
    let granted: Vec<String> = access
        .into_iter()
        .filter(|a| a.kind == "repository" && a.name == scope.repository)
        .flat_map(|a| a.actions.unwrap_or_default())
        .collect();
    granted.iter().any(|g| g == "*")
        || scope
            .actions
            .split(',')
            .all(|wanted| granted.iter().any(|g| g == wanted))
}

/// The authentication state of one client.
pub(super) struct Auth {
    pub(super) credentials: Option<Credentials>,
    settings: Settings,
    state: Mutex<State>,
    /// Held while a token is fetched, so that parallel uploads fetch it once.
    fetching: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct State {
    challenge: Option<Challenge>,
    /// The password header, kept so that the file is not read for each request.
    basic: Option<HeaderValue>,
    tokens: HashMap<Scope, Token>,
}

impl Auth {
    pub(super) fn new(credentials: Option<Credentials>, settings: Settings) -> Self {
        Self {
            credentials,
            settings,
            state: Mutex::default(),
            fetching: tokio::sync::Mutex::default(),
        }
    }

    /// The challenge, if it is known.
    pub(super) fn challenge(&self) -> Option<Challenge> {
        self.state.lock().challenge.clone()
    }

    pub(super) fn set_challenge(&self, challenge: Challenge) {
        self.state.lock().challenge = Some(challenge);
    }

    /// Whether requests are made as a user.
    pub(super) fn has_credentials(&self) -> bool {
        self.credentials.is_some()
    }

    /// Called when the registry rejected a request of this scope: discards the challenge, the
    /// password and the token.
    pub(super) fn on_rejected(&self, scope: &Scope, headers: &HeaderMap) {
        let challenge = Challenge::parse(headers);
        let mut state = self.state.lock();
        if challenge != Challenge::None {
            state.challenge = Some(challenge);
        }
        state.basic = None;
        state.tokens.remove(scope);
    }

    /// Discards all tokens. A token issued before a project existed grants nothing in it.
    pub(super) fn forget_tokens(&self) {
        self.state.lock().tokens.clear();
    }

    /// The password as a header, read from its source; `None` for an anonymous client.
    pub(super) async fn basic(&self) -> Result<Option<HeaderValue>, Fault> {
        match &self.credentials {
            Some(credentials) => credentials.basic().await.map(Some),
            None => Ok(None),
        }
    }

    /// The authorization header for a request of this scope.
    pub(super) async fn header(
        &self,
        http: &reqwest::Client,
        origin: &Origin,
        scope: &Scope,
    ) -> Result<Option<HeaderValue>, Error> {
        match self.challenge() {
            None | Some(Challenge::None) => Ok(None),
            Some(Challenge::Basic) => {
                if let Some(value) = self.state.lock().basic.clone() {
                    return Ok(Some(value));
                }
                let value = self.basic().await?;
                self.state.lock().basic.clone_from(&value);
                Ok(value)
            }
            Some(Challenge::Bearer { realm, service }) => {
                let cached = |state: &State| {
                    state
                        .tokens
                        .get(scope)
                        .filter(|t| t.expires > Instant::now())
                        .map(|t| t.header.clone())
                };
                if let Some(header) = cached(&self.state.lock()) {
                    return Ok(Some(header));
                }
                let _one_at_a_time = self.fetching.lock().await;
                if let Some(header) = cached(&self.state.lock()) {
                    return Ok(Some(header));
                }
                let token = self.fetch(http, origin, &realm, &service, scope).await?;
                let header = token.header.clone();
                let mut state = self.state.lock();
                if state.tokens.len() >= limits::REGISTRY_TOKENS_KEPT_MAX {
                    state.tokens.clear();
                }
                state.tokens.insert(scope.clone(), token);
                Ok(Some(header))
            }
        }
    }

    async fn fetch(
        &self,
        http: &reqwest::Client,
        origin: &Origin,
        realm: &str,
        service: &str,
        scope: &Scope,
    ) -> Result<Token, Error> {
        let url = realm.parse::<reqwest::Url>().map_err(|_| {
            Fault::config("the registry names a token service with an invalid address")
        })?;
        if let Some(credentials) = &self.credentials {
            credentials.may_go_to(&url, origin, self.settings)?;
        }
        let mut query: Vec<(&str, String)> = scope
            .scopes()
            .into_iter()
            .map(|word| ("scope", word))
            .collect();
        if !service.is_empty() {
            query.push(("service", service.to_owned()));
        }
        let service_host = authority(&url);
        let mut request = http.get(url).query(&query);
        if let Some(basic) = self.basic().await? {
            request = request.header(AUTHORIZATION, basic);
        }
        let requested_at = Instant::now();
        let response = tokio::time::timeout(limits::REGISTRY_SILENCE_MAX, request.send())
            .await
            .map_err(|_| Fault::unreachable("the registry's token service: no answer in time"))?
            .map_err(|e| {
                no_answer(&e)
                    .fault(&self.settings, &origin.authority)
                    .context(format_args!(
                        "the registry's token service at {service_host}"
                    ))
            })?;
        if !response.status().is_success() {
            let answer = Answer::read(response).await;
            // Token services reject a client with one of three statuses, which mean the same.
            let status = if matches!(answer.status, 400 | 403) {
                401
            } else {
                answer.status
            };
            return Err(Answer { status, ..answer }.into());
        }
        if is_html(response.headers()) {
            return Err(Fault::unreachable(format!(
                "the registry's token service at {service_host}: a web page answered, not a token service"
            ))
            .with_next(
                "a proxy or a login page in front of it must let requests for tokens through; check also the address that the registry states for it",
            )
            .into());
        }
        let body = super::read_capped(response, limits::REGISTRY_BODY_BYTES_MAX).await?;
        read_token(&body, scope, requested_at)
    }
}

/// Parses the answer of a token service to a request that was sent at this time.
pub(crate) fn read_token(
    body: &[u8],
    scope: &Scope,
    requested_at: Instant,
) -> Result<Token, Error> {
    let reply: TokenReply = serde_json::from_slice(body).map_err(|_| {
        Fault::unreachable("the registry's token service returned an answer that is not a token")
    })?;
    let token = reply.token.or(reply.access_token).filter(|t| !t.is_empty());
    let token = token.ok_or_else(|| {
        Fault::unreachable("the registry's token service returned an answer without a token")
    })?;
    if !grants(&token, scope) {
        let message = format!(
            "the token service does not grant {} on {}",
            scope.actions, scope.repository
        );
        return Err(Answer {
            status: 401,
            code: "DENIED".into(),
            message,
            ..Answer::default()
        }
        .into());
    }
    let lifetime = reply
        .expires_in
        .map_or(TOKEN_LIFE_DEFAULT, Duration::from_secs)
        .min(Duration::from_secs(24 * 3600));
    // The last tenth of the lifetime is not used, so that a token does not expire during a
    // request.
    Ok(Token {
        header: sensitive(format!("Bearer {token}"))?,
        expires: requested_at + lifetime.mul_f64(0.9),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use base::fault::{Reason, Retry};

    fn parse(headers: &[&str]) -> Challenge {
        let mut map = HeaderMap::new();
        for value in headers {
            map.append(WWW_AUTHENTICATE, value.parse().unwrap());
        }
        Challenge::parse(&map)
    }

    #[test]
    fn challenges_are_parsed() {
        let bearer = |realm: &str, service: &str| Challenge::Bearer {
            realm: realm.into(),
            service: service.into(),
        };
        assert_eq!(parse(&[]), Challenge::None);
        assert_eq!(parse(&["Basic realm=\"x, y=z\""]), Challenge::Basic);
        let harbor = r#"Bearer realm="https://h/service/token",service="harbor-registry",scope="repository:a/b:pull,push""#;
        assert_eq!(
            parse(&[harbor]),
            bearer("https://h/service/token", "harbor-registry")
        );
        assert!(parse(&[harbor]).is_harbor());
        assert_eq!(
            parse(&[r#"Basic realm="b", Bearer realm="https://t/a", service=s"#]),
            bearer("https://t/a", "s")
        );
        assert_eq!(
            parse(&["Basic realm=b", r#"bearer REALM="https://t/\"q""#]),
            bearer("https://t/\"q", "")
        );
        assert_eq!(
            parse(&["Negotiate", "Bearer", "\u{7f}=,,=\""].map(|s| s.trim_start_matches('\u{7f}'))),
            Challenge::None
        );
    }

    #[test]
    fn a_token_without_access_is_detected() {
        let token = |claims: &str| format!("h.{}.s", URL_SAFE_NO_PAD.encode(claims));
        let scope = Scope {
            repository: "op/seg".into(),
            actions: "pull,push",
            mount_from: None,
        };
        let access = |actions: &str| {
            token(&format!(
                r#"{{"access":[{{"type":"repository","name":"op/seg","actions":{actions}}}]}}"#
            ))
        };
        assert!(grants(&access(r#"["push","pull"]"#), &scope));
        assert!(grants(&access(r#"["*"]"#), &scope));
        assert!(!grants(&access(r#"["pull"]"#), &scope));
        assert!(!grants(&access("[]"), &scope) && !grants(&access("null"), &scope));
        assert!(!grants(&token(r#"{"access":[]}"#), &scope));
        assert!(grants("opaque", &scope) && grants(&token("{}"), &scope));
    }

    #[test]
    fn the_password_goes_to_the_registry_and_to_listed_hosts_only() {
        let credentials = Credentials::new("u", "p")
            .with_realm_hosts(&["Tokens.example.com".into(), "other:8443".into()]);
        let may = |registry: &str, realm: &str| {
            let (origin, _) = Origin::split(registry).unwrap();
            credentials
                .may_go_to(&realm.parse().unwrap(), &origin, Settings::Daemon)
                .map_err(|fault| fault.code)
        };
        for (registry, realm) in [
            ("https://h", "https://h/service/token"),
            ("https://h:443", "https://H/token"),
            ("http://h:5000", "http://h:5000/token"),
            ("https://h", "https://tokens.example.com/a"),
            ("https://h", "https://tokens.example.com:5001/a"),
            ("https://h", "https://other:8443/a"),
            (
                "https://registry-1.docker.io",
                "https://auth.docker.io/token",
            ),
        ] {
            assert_eq!(may(registry, realm), Ok(()), "{registry} {realm}");
        }
        for (registry, realm) in [
            ("https://h", "http://h/token"),
            ("https://h", "https://evil/token"),
            ("https://h", "https://h.evil/token"),
            ("https://h", "https://h:444/token"),
            ("http://127.0.0.1:5000", "http://127.0.0.1:5001/token"),
            ("https://h", "https://other/a"),
            ("https://h", "http://tokens.example.com/a"),
            ("https://h", "https://auth.docker.io/token"),
            ("https://h", "https://h@evil/token"),
        ] {
            assert_eq!(
                may(registry, realm),
                Err(base::fault::Code::NotAllowed),
                "{registry} {realm}"
            );
        }
    }

    #[test]
    fn secrets_are_not_printed() {
        assert_eq!(
            format!("{:?}", Credentials::new("robot$x", "hunter2")),
            "Credentials(..)"
        );
        assert!(Credentials::from_config(Some("u"), None).is_err());
        let fault = Credentials::from_file("u", "/nowhere/secret".into()).unwrap_err();
        assert_eq!(fault.code, base::fault::Code::Config);
    }

    #[tokio::test]
    async fn a_missing_password_file_is_retried() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("password");
        durable::replace_secret(&file, b"hunter2\n").unwrap();
        let credentials = Credentials::from_file("u", file.clone()).unwrap();
        std::fs::remove_file(&file).unwrap();
        let fault = credentials.basic().await.unwrap_err();
        assert_eq!(
            (fault.reason, fault.retry),
            (Reason::SinkDenied, Retry::Backoff),
            "{fault:?}"
        );
        assert!(
            fault.next.contains(file.to_str().unwrap()),
            "{}",
            fault.next
        );
        durable::replace_secret(&file, b"hunter2\n").unwrap();
        credentials.basic().await.unwrap();
    }
}
