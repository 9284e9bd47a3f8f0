//! Small generated images, and registries for them: Debian's docker-registry, started and stopped
//! by the test.

use std::io::Write;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::{RawQuery, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use serde_json::json;

use crate::image::{OCI_INDEX, OCI_MANIFEST, Sha256};

pub const USER: &str = "robot$op+packhorse";
pub const PASSWORD: &str = "s3cret-hunter2";

/// The metadata of an image.
#[derive(Debug, Clone)]
pub struct Info {
    pub media_type: String,
    pub digest: String,
    pub size: u64,
    pub platforms: Vec<String>,
}

/// An image in an OCI layout directory, as the transfer engine stages it.
pub struct Image {
    pub dir: PathBuf,
    pub info: Info,
    pub layers: Vec<Sha256>,
}

pub fn write(path: &Path, bytes: &[u8]) {
    std::fs::File::create(path)
        .unwrap()
        .write_all(bytes)
        .unwrap();
}

/// Random bytes that differ for each seed.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    blake3::Hasher::new()
        .update(&seed.to_le_bytes())
        .finalize_xof()
        .fill(&mut out);
    out
}

fn put(dir: &Path, bytes: &[u8]) -> (Sha256, usize) {
    let digest = Sha256::of(bytes);
    write(&dir.join(digest.layout_path()), bytes);
    (digest, bytes.len())
}

fn manifest(dir: &Path, architecture: &str, layers: &[Vec<u8>]) -> (Sha256, usize) {
    let diff_ids: Vec<_> = layers.iter().map(|l| Sha256::of(l)).collect();
    let config = json!({"architecture": architecture, "os": "linux", "config": {}, "rootfs": {"type": "layers", "diff_ids": diff_ids}});
    let (config, config_size) = put(dir, config.to_string().as_bytes());
    let layers: Vec<_> = layers
        .iter()
        .map(|layer| json!({"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": put(dir, layer).0, "size": layer.len()}))
        .collect();
    let config = json!({"mediaType": "application/vnd.oci.image.config.v1+json", "digest": config, "size": config_size});
    let manifest =
        json!({"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config, "layers": layers});
    // Unusual white space, so that a program that rewrites the JSON is detected.
    put(
        dir,
        serde_json::to_string_pretty(&manifest).unwrap().as_bytes(),
    )
}

/// Stages an image with these layers; two platforms make an index with two manifests.
pub fn image(dir: &Path, layers: &[Vec<u8>], platforms: &[&str]) -> Image {
    std::fs::create_dir_all(dir.join("blobs/sha256")).unwrap();
    let made: Vec<_> = platforms
        .iter()
        .map(|p| (p, manifest(dir, p, layers)))
        .collect();
    let (media_type, (top, size)) = match made.as_slice() {
        [(_, one)] => (OCI_MANIFEST, *one),
        many => {
            let entries: Vec<_> = many
                .iter()
                .map(|(p, (digest, size))| {
                    json!({"mediaType": OCI_MANIFEST, "digest": digest, "size": size, "platform": {"os": "linux", "architecture": p}})
                })
                .collect();
            (
                OCI_INDEX,
                put(
                    dir,
                    json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries})
                        .to_string()
                        .as_bytes(),
                ),
            )
        }
    };
    let index = json!({"schemaVersion": 2, "manifests": [{"mediaType": media_type, "digest": top, "size": size}]});
    write(&dir.join("index.json"), index.to_string().as_bytes());
    write(
        &dir.join("oci-layout"),
        br#"{"imageLayoutVersion":"1.0.0"}"#,
    );
    let info = Info {
        media_type: media_type.into(),
        digest: top.to_string(),
        size: size as u64,
        platforms: platforms.iter().map(|p| format!("linux/{p}")).collect(),
    };
    Image {
        dir: dir.into(),
        info,
        layers: layers.iter().map(|l| Sha256::of(l)).collect(),
    }
}

/// A layer that tools can unpack: a tar with one file.
pub fn tar_layer(name: &str, content: &[u8]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(content.len() as u64);
    header.set_mode(0o644);
    builder.append_data(&mut header, name, content).unwrap();
    builder.into_inner().unwrap()
}

/// The authentication method of a registry.
pub enum Access {
    Open,
    Basic,
    Bearer(Arc<TokenService>),
    Tls { certificate: String, key: String },
}

/// A docker-registry for this test, on a free port. Dropping it stops the process.
pub struct RealRegistry {
    child: Child,
    pub address: String,
    pub dir: tempfile::TempDir,
    https: bool,
}

impl Drop for RealRegistry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl RealRegistry {
    pub fn start(access: &Access) -> Self {
        Self::start_as(access, None)
    }

    /// A registry that gives uploads an address with this host name.
    pub fn start_as(access: &Access, host: Option<&str>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).display().to_string();
        let (mut auth, mut tls) = (String::new(), String::new());
        match access {
            Access::Open => {}
            Access::Basic => {
                let made = Command::new("htpasswd")
                    .args(["-nbB", USER, PASSWORD])
                    .output();
                let line = made
                    .expect(
                        "htpasswd is missing: run scripts/test, or apt-get install apache2-utils",
                    )
                    .stdout;
                write(&dir.path().join("htpasswd"), &line);
                auth = format!(
                    "auth:\n  htpasswd:\n    realm: test\n    path: {}\n",
                    path("htpasswd")
                );
            }
            Access::Bearer(service) => {
                write(
                    &dir.path().join("token.pem"),
                    service.certificate.pem().as_bytes(),
                );
                auth = format!(
                    "auth:\n  token:\n    realm: {}\n    service: test\n    issuer: packhorse-test\n    rootcertbundle: {}\n",
                    service.realm(),
                    path("token.pem")
                );
            }
            Access::Tls { certificate, key } => {
                write(&dir.path().join("tls.pem"), certificate.as_bytes());
                write(&dir.path().join("tls.key"), key.as_bytes());
                tls = format!(
                    "  tls:\n    certificate: {}\n    key: {}\n",
                    path("tls.pem"),
                    path("tls.key")
                );
            }
        }
        for _ in 0..5 {
            let address = format!("127.0.0.1:{}", base::testing::free_port());
            let host = host.map_or_else(String::new, |host| {
                let port = address.rsplit(':').next().unwrap();
                format!("  host: http://{host}:{port}\n")
            });
            let config = format!(
                "version: 0.1\nlog:\n  level: error\n  accesslog:\n    disabled: true\nstorage:\n  filesystem:\n    rootdirectory: {}\n  delete:\n    enabled: true\nhttp:\n  addr: {address}\n  secret: fixed\n{host}{tls}{auth}",
                path("data")
            );
            write(&dir.path().join("config.yml"), config.as_bytes());
            let started = Command::new("docker-registry")
                .args(["serve", &path("config.yml")])
                .stdout(Stdio::null())
                .stderr(Stdio::from(std::fs::File::create(path("log")).unwrap()))
                .spawn();
            let mut child = started.expect(
                "docker-registry is missing: run scripts/test, or apt-get install docker-registry",
            );
            let begun = Instant::now();
            while begun.elapsed() < Duration::from_secs(20) {
                if child.try_wait().unwrap().is_some() {
                    break; // another process took the port
                }
                if TcpStream::connect(&address).is_ok() {
                    return Self {
                        child,
                        address,
                        dir,
                        https: !tls.is_empty(),
                    };
                }
                std::thread::sleep(Duration::from_millis(20));
            }
            let _ = child.kill();
            let _ = child.wait();
        }
        let log = std::fs::read_to_string(path("log")).unwrap_or_default();
        unreachable!("docker-registry did not start: {log}")
    }

    pub fn url(&self, prefix: &str) -> String {
        format!(
            "{}://{}/{prefix}",
            if self.https { "https" } else { "http" },
            self.address
        )
    }
}

/// A token service for docker-registry: ES256 with the certificate in the token.
pub struct TokenService {
    address: String,
    certificate: rcgen::Certificate,
    key: rcgen::KeyPair,
    pub asked: AtomicUsize,
    /// If true, answers 200 with a token that grants nothing, as Harbor does.
    pub grant_nothing: AtomicBool,
}

impl TokenService {
    pub async fn start() -> Arc<Self> {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::new(vec!["token".to_owned()]).unwrap();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let service = Arc::new(Self {
            address: listener.local_addr().unwrap().to_string(),
            certificate: params.self_signed(&key).unwrap(),
            key,
            asked: AtomicUsize::new(0),
            grant_nothing: AtomicBool::new(false),
        });
        let app = Router::new()
            .route("/token", get(token))
            .with_state(service.clone());
        tokio::spawn(async move { axum::serve(listener, app).await });
        service
    }

    pub fn address(&self) -> &str {
        &self.address
    }

    fn realm(&self) -> String {
        format!("http://{}/token", self.address)
    }

    fn sign(&self, access: &serde_json::Value) -> String {
        let now = base::clock::now_unix_ms() / 1000;
        let header =
            json!({"typ": "JWT", "alg": "ES256", "x5c": [STANDARD.encode(self.certificate.der())]});
        let claims = json!({"iss": "packhorse-test", "sub": USER, "aud": "test", "exp": now + 300, "nbf": now - 10, "iat": now,
            "jti": now.to_string(), "access": access});
        let text = format!(
            "{}.{}",
            URL_SAFE_NO_PAD.encode(header.to_string()),
            URL_SAFE_NO_PAD.encode(claims.to_string())
        );
        let random = ring::rand::SystemRandom::new();
        let algorithm = &ring::signature::ECDSA_P256_SHA256_FIXED_SIGNING;
        let key = ring::signature::EcdsaKeyPair::from_pkcs8(
            algorithm,
            &self.key.serialize_der(),
            &random,
        )
        .unwrap();
        format!(
            "{text}.{}",
            URL_SAFE_NO_PAD.encode(key.sign(&random, text.as_bytes()).unwrap())
        )
    }
}

async fn token(
    State(service): State<Arc<TokenService>>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
) -> Response {
    service.asked.fetch_add(1, Ordering::Relaxed);
    let expected = format!("Basic {}", STANDARD.encode(format!("{USER}:{PASSWORD}")));
    if headers
        .get("authorization")
        .is_none_or(|v| v != expected.as_str())
    {
        return (
            StatusCode::UNAUTHORIZED,
            r#"{"errors":[{"code":"UNAUTHORIZED","message":"wrong password"}]}"#,
        )
            .into_response();
    }
    let url = reqwest::Url::parse(&format!("http://x/?{}", query.unwrap_or_default())).unwrap();
    let access: Vec<_> = url
        .query_pairs()
        .filter(|(key, _)| key == "scope")
        .map(|(_, scope)| {
            let parts: Vec<&str> = scope.splitn(3, ':').collect();
            let actions: Vec<&str> = if service.grant_nothing.load(Ordering::Relaxed) {
                Vec::new()
            } else {
                parts[2].split(',').collect()
            };
            json!({"type": parts[0], "name": parts[1], "actions": actions})
        })
        .collect();
    json!({"token": service.sign(&json!(access)), "expires_in": 300})
        .to_string()
        .into_response()
}
