//! Debian's docker-registry, with a password file (Basic) or with a token server (Bearer) like
//! Harbor's.

use std::fs::File;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Child;
use std::sync::Arc;

use axum::Router;
use axum::extract::RawQuery;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair};
use serde_json::json;

use super::command::{bound, tool, wait};
use super::http::{Serving, basic_auth, query_pairs, serve};
use super::{Scratch, daemon, free_port, register_log, secs, wait_for};

/// The user that sites push as.
pub(crate) const USER: &str = "robot$packhorse";
/// Its password.
pub(crate) const PASSWORD: &str = "s3cret: ☂";
const SERVICE: &str = "test-registry";
const ISSUER: &str = "test-issuer";

/// A running registry.
pub(crate) struct Registry {
    name: String,
    address: SocketAddr,
    config: PathBuf,
    log: PathBuf,
    child: Option<Child>,
    tokens: Option<Serving>,
}

impl Registry {
    /// Starts a registry with a password file.
    pub(crate) fn basic(scratch: &Scratch, name: &str) -> Self {
        let htpasswd = scratch.join(&format!("{name}.htpasswd"));
        std::fs::write(&htpasswd, tool("htpasswd", &["-Bbn", USER, PASSWORD]))
            .expect("write the password file");
        let auth = format!(
            "  htpasswd:\n    realm: test\n    path: {}\n",
            htpasswd.display()
        );
        Self::start_new(scratch, name, &auth, None)
    }

    /// Starts a registry and the token server that it trusts.
    pub(crate) fn bearer(scratch: &Scratch, name: &str) -> Self {
        let signer = Arc::new(Signer::new());
        let bundle = scratch.join(&format!("{name}-tokens.pem"));
        std::fs::write(&bundle, &signer.certificate_pem).expect("write the certificate");
        let tokens = serve(|_| token_server(signer));
        let auth = format!(
            "  token:\n    realm: http://{}/token\n    service: {SERVICE}\n    issuer: {ISSUER}\n    rootcertbundle: {}\n",
            tokens.address,
            bundle.display()
        );
        Self::start_new(scratch, name, &auth, Some(tokens))
    }

    fn start_new(scratch: &Scratch, name: &str, auth: &str, tokens: Option<Serving>) -> Self {
        let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let config = scratch.join(&format!("{name}.yml"));
        let text = format!(
            "version: 0.1\nlog:\n  level: info\n  accesslog:\n    disabled: false\nstorage:\n  filesystem:\n    rootdirectory: {}\n  \
             delete:\n    enabled: true\nhttp:\n  addr: {address}\n  secret: fixed\nauth:\n{auth}",
            scratch.folder(name).display()
        );
        std::fs::write(&config, text).expect("write the registry's config");
        let log = scratch.join(&format!("{name}.log"));
        register_log(&log);
        let mut registry = Self {
            name: name.into(),
            address,
            config,
            log,
            child: None,
            tokens,
        };
        registry.start();
        registry
    }

    /// Starts it and waits until it answers.
    pub(crate) fn start(&mut self) {
        let log = File::options()
            .create(true)
            .append(true)
            .open(&self.log)
            .expect("open the log");
        let mut command = bound("docker-registry");
        command
            .arg("serve")
            .arg(&self.config)
            .stdout(log.try_clone().expect("a handle for the log"))
            .stderr(log);
        self.child = Some(command.spawn().expect("start docker-registry"));
        wait_for(&format!("registry {} answers", self.name), secs(20), || {
            (daemon::get(self.address, "/v2/")?.0 == 401).then_some(())
        });
    }

    /// Stops it at once.
    pub(crate) fn stop(&mut self) {
        let mut child = self.child.take().expect("the registry runs");
        child.kill().expect("kill the registry");
        wait(&mut child, secs(10)).expect("the registry ends");
    }

    /// The lines of `[sink.images]` for it; writes the password file.
    pub(crate) fn sink(&self, scratch: &Scratch) -> String {
        let file = scratch.join(&format!("{}-password", self.name));
        std::fs::write(&file, PASSWORD).expect("write the password");
        // The token service has its own port.
        let tokens = self
            .tokens
            .as_ref()
            .map(|tokens| format!("\nrealm_hosts = [\"{}\"]", tokens.address))
            .unwrap_or_default();
        format!(
            "url = \"http://{}/operators\"\nusername = \"{USER}\"\npassword_file = \"{}\"{tokens}",
            self.address,
            file.display()
        )
    }

    /// `host:port`.
    pub(crate) fn host(&self) -> String {
        self.address.to_string()
    }

    /// Runs skopeo against it: `{}` in an argument is `docker://HOST`.
    #[track_caller]
    pub(crate) fn skopeo(&self, command: &str, args: &[&str]) -> String {
        let credentials = format!("{USER}:{PASSWORD}");
        let mut all = vec![command.to_owned()];
        match command {
            "copy" => all.extend([
                "--src-creds".into(),
                credentials,
                "--src-tls-verify=false".into(),
                "--dest-tls-verify=false".into(),
            ]),
            _ => all.extend(["--creds".into(), credentials, "--tls-verify=false".into()]),
        }
        all.extend(
            args.iter()
                .map(|a| a.replace("{}", &format!("docker://{}", self.address))),
        );
        tool(
            "skopeo",
            &all.iter().map(String::as_str).collect::<Vec<_>>(),
        )
    }

    /// The `sha256:` digest of the manifest of a reference (`repo:tag`), computed from the
    /// registry's answer.
    #[track_caller]
    pub(crate) fn digest(&self, reference: &str) -> String {
        let raw = self.skopeo("inspect", &["--raw", &format!("{{}}/{reference}")]);
        super::images::sha256(raw.as_bytes())
    }

    /// Copies an image into the registry with skopeo, from any skopeo source.
    #[track_caller]
    pub(crate) fn push(&self, source: &str, reference: &str) {
        let credentials = format!("{USER}:{PASSWORD}");
        let target = format!("docker://{}/{reference}", self.address);
        tool(
            "skopeo",
            &[
                "copy",
                "--all",
                "--dest-creds",
                &credentials,
                "--dest-tls-verify=false",
                source,
                &target,
            ],
        );
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// The signer of the tokens: a P-256 key and its self-signed certificate, which the registry has as
/// its root.
struct Signer {
    key: EcdsaKeyPair,
    certificate_pem: String,
    certificate_der: Vec<u8>,
    random: SystemRandom,
}

impl Signer {
    fn new() -> Self {
        let key =
            rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).expect("create a key");
        let params = rcgen::CertificateParams::new(vec!["token.test".to_owned()])
            .expect("a certificate for a name");
        let certificate = params.self_signed(&key).expect("sign the certificate");
        let random = SystemRandom::new();
        let pair = EcdsaKeyPair::from_pkcs8(
            &ECDSA_P256_SHA256_FIXED_SIGNING,
            &key.serialize_der(),
            &random,
        )
        .expect("read the key back");
        Self {
            key: pair,
            certificate_pem: certificate.pem(),
            certificate_der: certificate.der().to_vec(),
            random,
        }
    }

    fn token(&self, subject: &str, access: &serde_json::Value) -> String {
        let now = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .expect("after 1970")
            .as_secs();
        let header = json!({ "typ": "JWT", "alg": "ES256", "x5c": [STANDARD.encode(&self.certificate_der)] });
        let claims = json!({
            "iss": ISSUER, "sub": subject, "aud": SERVICE, "iat": now, "nbf": now - 10, "exp": now + 300, "jti": format!("{now}"), "access": access,
        });
        let text = format!(
            "{}.{}",
            URL_SAFE_NO_PAD.encode(header.to_string()),
            URL_SAFE_NO_PAD.encode(claims.to_string())
        );
        let signature = self
            .key
            .sign(&self.random, text.as_bytes())
            .expect("sign a token");
        format!("{text}.{}", URL_SAFE_NO_PAD.encode(signature))
    }
}

fn token_server(signer: Arc<Signer>) -> Router {
    Router::new().route(
        "/token",
        get(
            move |RawQuery(query): RawQuery, headers: HeaderMap| async move {
                answer_token(&signer, query.as_deref(), &headers)
            },
        ),
    )
}

fn answer_token(signer: &Signer, query: Option<&str>, headers: &HeaderMap) -> Response {
    let user = basic_auth(
        headers
            .get(header::AUTHORIZATION)
            .and_then(|v| v.to_str().ok()),
    );
    if user != Some((USER.to_owned(), PASSWORD.to_owned())) {
        return (StatusCode::UNAUTHORIZED, "wrong user or password").into_response();
    }
    let access: Vec<_> = query_pairs(query)
        .iter()
        .filter(|(name, _)| name == "scope")
        .flat_map(|(_, value)| value.split(' ').map(ToOwned::to_owned).collect::<Vec<_>>())
        .filter_map(|scope| {
            // The name may contain colons (host:port), so the ends are split off first.
            let (kind, rest) = scope.split_once(':')?;
            let (name, actions) = rest.rsplit_once(':')?;
            Some(json!({ "type": kind, "name": name, "actions": actions.split(',').collect::<Vec<_>>() }))
        })
        .collect();
    let token = signer.token(USER, &json!(access));
    axum::Json(json!({ "token": token, "expires_in": 300 })).into_response()
}
