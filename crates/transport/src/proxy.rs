//! Proxies for the TCP transport: HTTP `CONNECT` and SOCKS5.
//!
//! `dial` calls `Proxy::open`, which opens a connection to the hub through the proxy; the proxy
//! resolves the hub's name. The TLS of the hub runs inside, so a proxy sees no content. A password
//! is read from its file at each connection, and never shown. Nothing is stored.

mod settings;

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::clean;
use base::blocking::blocking;
use base::fault::{Fault, Reason};
use base::limits::{PROXY_ANSWER_BYTES_MAX, PROXY_ANSWER_MAX, PROXY_URL_BYTES_MAX};
use base::secrets::read_secret;

pub use settings::ProxySettings;

/// The protocol of a proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Protocol {
    HttpConnect,
    Socks5,
}

/// Where the password of a proxy is.
#[derive(Clone, PartialEq, Eq)]
enum Password {
    File(PathBuf),
    /// In the URL of an environment variable.
    Text(String),
}

impl fmt::Debug for Password {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Password::File(path) => write!(f, "{path:?}"),
            Password::Text(_) => f.write_str("(hidden)"),
        }
    }
}

/// A proxy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proxy {
    protocol: Protocol,
    /// `HOST:PORT`.
    address: String,
    user: Option<String>,
    password: Option<Password>,
}

impl fmt::Display for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = match self.protocol {
            Protocol::HttpConnect => "http",
            Protocol::Socks5 => "socks5",
        };
        write!(f, "{scheme}://{}", self.address)
    }
}

impl Proxy {
    /// Reads `http://HOST:PORT` or `socks5://HOST:PORT`, with `USER@` or `USER:PASSWORD@` before
    /// the host. An error does not repeat the text, which may hold a password.
    pub fn parse(url: &str) -> Result<Self, String> {
        if url.len() > PROXY_URL_BYTES_MAX {
            return Err("the URL of the proxy is too long".into());
        }
        let (scheme, rest) = url
            .split_once("://")
            .ok_or("the proxy is not http://HOST:PORT or socks5://HOST:PORT")?;
        let (protocol, default_port) = match scheme {
            "http" => (Protocol::HttpConnect, 80),
            "socks5" | "socks5h" => (Protocol::Socks5, 1080),
            "https" => {
                return Err("a proxy that is itself reached over TLS (https://) is not supported; use http:// or socks5://".into());
            }
            _ => return Err("the proxy is not http://HOST:PORT or socks5://HOST:PORT".into()),
        };
        let authority = rest.strip_suffix('/').unwrap_or(rest);
        let (credentials, host) = match authority.rsplit_once('@') {
            Some((credentials, host)) => (Some(credentials), host),
            None => (None, authority),
        };
        let odd = |c: char| c.is_whitespace() || c.is_control() || matches!(c, '/' | '?' | '#');
        if host.is_empty() || host.contains(odd) {
            return Err("the proxy has no valid HOST:PORT".into());
        }
        let has_port = host.rsplit_once(':').is_some_and(|(name, port)| {
            !name.is_empty() && port.bytes().all(|b| b.is_ascii_digit())
        });
        let address = match has_port {
            true => host.to_owned(),
            false => format!("{host}:{default_port}"),
        };
        let port = address
            .rsplit_once(':')
            .map(|(_, port)| port.parse::<u16>());
        if !matches!(port, Some(Ok(1..))) {
            return Err("the port of the proxy is not between 1 and 65535".into());
        }
        let (user, password) = match credentials {
            None => (None, None),
            Some(text) => {
                let (user, password) = match text.split_once(':') {
                    Some((user, password)) => (user, Some(decode_percent(password)?)),
                    None => (text, None),
                };
                (Some(decode_percent(user)?), password.map(Password::Text))
            }
        };
        Ok(Self {
            protocol,
            address,
            user: user.filter(|user| !user.is_empty()),
            password,
        })
    }

    /// Whether the URL had a password.
    pub fn has_password_text(&self) -> bool {
        matches!(self.password, Some(Password::Text(_)))
    }

    /// Whether it has a user name.
    pub fn has_user(&self) -> bool {
        self.user.is_some()
    }

    /// The same proxy, with the password in this file.
    #[must_use]
    pub fn with_password_file(self, path: PathBuf) -> Self {
        Self {
            password: Some(Password::File(path)),
            ..self
        }
    }

    /// `HOST:PORT`.
    pub(super) fn address(&self) -> &str {
        &self.address
    }

    /// Opens a connection to `hub` through this proxy, which `socket` is connected to.
    pub(super) async fn open(&self, socket: &mut TcpStream, hub: &str) -> Result<(), Fault> {
        let credentials = self.credentials().await?;
        let credentials = credentials
            .as_ref()
            .map(|(user, password)| (&**user, &**password));
        let opening = async {
            match self.protocol {
                Protocol::HttpConnect => self.connect_http(socket, hub, credentials).await,
                Protocol::Socks5 => self.connect_socks5(socket, hub, credentials).await,
            }
        };
        let opened = tokio::time::timeout(PROXY_ANSWER_MAX, opening).await;
        let opened = opened.unwrap_or_else(|_| {
            let why = format!("did not answer within {} s", PROXY_ANSWER_MAX.as_secs());
            Err(self
                .fault(why)
                .with_next("check that [hub] proxy names a proxy of this kind, and that the proxy can reach the hub; the connection is then retried automatically")
                .into())
        });
        opened.map_err(|refusal| match refusal {
            Refusal::Said(fault) => *fault,
            Refusal::Io(e) => self.fault(format!("ended the connection: {e}")).with_next(
                "check that [hub] proxy names a proxy of this kind, and read the log of the proxy",
            ),
        })
    }

    /// The fault of a proxy that cannot be reached.
    pub(super) fn unreachable(&self, why: &str) -> Fault {
        self.fault(format!("cannot be reached: {why}"))
            .with_next("check [hub] proxy (or HTTPS_PROXY and ALL_PROXY), and that the proxy is running; the connection is then retried automatically")
    }

    fn fault(&self, why: impl fmt::Display) -> Fault {
        Fault::unreachable(format!("the proxy {self} {why}")).with_reason(Reason::HubUnreachable)
    }

    fn rejects_credentials(&self, why: &str) -> Fault {
        self.fault(why).with_next(
            "set the user name in [hub] proxy (scheme://USER@HOST:PORT) and [hub] proxy_password_file; the connection is then retried automatically",
        )
    }

    async fn credentials(&self) -> Result<Option<(String, String)>, Fault> {
        let Some(user) = self.user.clone() else {
            return Ok(None);
        };
        let password = match &self.password {
            None => String::new(),
            Some(Password::Text(text)) => text.clone(),
            Some(Password::File(path)) => {
                let path = path.clone();
                blocking(move || read_secret(&path)).await?
            }
        };
        Ok(Some((user, password)))
    }

    async fn connect_http(
        &self,
        socket: &mut TcpStream,
        hub: &str,
        credentials: Option<(&str, &str)>,
    ) -> Result<(), Refusal> {
        let authorization = credentials.map_or_else(String::new, |(user, password)| {
            let text = BASE64.encode(format!("{user}:{password}"));
            format!("Proxy-Authorization: Basic {text}\r\n")
        });
        let request = format!("CONNECT {hub} HTTP/1.1\r\nHost: {hub}\r\n{authorization}\r\n");
        socket.write_all(request.as_bytes()).await?;
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            if head.len() >= PROXY_ANSWER_BYTES_MAX {
                return Err(self.fault("sent an answer that is too long").into());
            }
            // One byte at a time: what follows the answer belongs to the hub.
            head.push(socket.read_u8().await?);
        }
        let head = String::from_utf8_lossy(&head);
        let line = head.lines().next().unwrap_or_default();
        let status = line
            .split(' ')
            .nth(1)
            .and_then(|code| code.parse::<u16>().ok());
        match status {
            Some(200..=299) => Ok(()),
            Some(407) => {
                let why = match credentials {
                    Some(_) => "rejected the user name or the password (407)",
                    None => "requires a user name and a password (407)",
                };
                Err(self.rejects_credentials(why).into())
            }
            Some(code) => Err(self
                .fault(format!("refuses to connect to {hub} ({code}): {}", clean(line)))
                .with_next("allow this destination at the proxy, and check that the proxy can reach and resolve the hub; the connection is then retried automatically")
                .into()),
            None => Err(self
                .fault("does not answer as an HTTP proxy")
                .with_next("check [hub] proxy: a SOCKS proxy is socks5://HOST:PORT")
                .into()),
        }
    }

    async fn connect_socks5(
        &self,
        socket: &mut TcpStream,
        hub: &str,
        credentials: Option<(&str, &str)>,
    ) -> Result<(), Refusal> {
        const NO_CREDENTIALS: u8 = 0;
        const USER_AND_PASSWORD: u8 = 2;
        let methods: &[u8] = match credentials {
            None => &[5, 1, NO_CREDENTIALS],
            Some(_) => &[5, 2, NO_CREDENTIALS, USER_AND_PASSWORD],
        };
        socket.write_all(methods).await?;
        let mut chosen = [0; 2];
        socket.read_exact(&mut chosen).await?;
        match (chosen, credentials) {
            ([5, NO_CREDENTIALS], _) => {}
            ([5, USER_AND_PASSWORD], Some((user, password))) => {
                let mut message = vec![1];
                for text in [user, password] {
                    let len = u8::try_from(text.len()).map_err(|_| {
                        self.rejects_credentials(
                            "accepts no user name or password of more than 255 bytes",
                        )
                    })?;
                    message.push(len);
                    message.extend_from_slice(text.as_bytes());
                }
                socket.write_all(&message).await?;
                let mut answer = [0; 2];
                socket.read_exact(&mut answer).await?;
                if answer[1] != 0 {
                    return Err(self
                        .rejects_credentials("rejected the user name or the password")
                        .into());
                }
            }
            ([5, _], _) => {
                let why = match credentials {
                    Some(_) => "accepts neither this user name nor a connection without one",
                    None => "requires a user name and a password",
                };
                return Err(self.rejects_credentials(why).into());
            }
            _ => {
                return Err(self
                    .fault("does not answer as a SOCKS5 proxy")
                    .with_next("check [hub] proxy: an HTTP proxy is http://HOST:PORT")
                    .into());
            }
        }
        let mut request = vec![5, 1, 0];
        let (host, port) = split_host_port(hub)?;
        match host.parse::<IpAddr>() {
            Ok(IpAddr::V4(ip)) => {
                request.push(1);
                request.extend_from_slice(&ip.octets());
            }
            Ok(IpAddr::V6(ip)) => {
                request.push(4);
                request.extend_from_slice(&ip.octets());
            }
            Err(_) => {
                let len = u8::try_from(host.len()).map_err(|_| {
                    Fault::config(format!(
                        "the hub's host name is longer than 255 bytes: {hub}"
                    ))
                })?;
                request.extend_from_slice(&[3, len]);
                request.extend_from_slice(host.as_bytes());
            }
        }
        request.extend_from_slice(&port.to_be_bytes());
        socket.write_all(&request).await?;
        let mut head = [0; 4];
        socket.read_exact(&mut head).await?;
        if head[1] != 0 {
            let why = match head[1] {
                2 => "its rules do not allow it",
                3 => "the network cannot be reached",
                4 => "the host cannot be reached or its name cannot be resolved",
                5 => "the hub refused the connection",
                6 => "the time limit was exceeded",
                8 => "it does not support this kind of address",
                _ => "it failed",
            };
            return Err(self
                .fault(format!("cannot connect to {hub}: {why}"))
                .with_next("allow this destination at the proxy, and check that the proxy can reach and resolve the hub; the connection is then retried automatically")
                .into());
        }
        let rest = match head[3] {
            1 => 4,
            4 => 16,
            3 => usize::from(socket.read_u8().await?),
            _ => return Err(self.fault("sent a malformed answer").into()),
        };
        let mut bound = [0; 255 + 2];
        socket.read_exact(&mut bound[..rest + 2]).await?;
        Ok(())
    }
}

/// Why a proxy opened no connection.
enum Refusal {
    Said(Box<Fault>),
    Io(std::io::Error),
}

impl From<Fault> for Refusal {
    fn from(fault: Fault) -> Self {
        Self::Said(Box::new(fault))
    }
}

impl From<std::io::Error> for Refusal {
    fn from(error: std::io::Error) -> Self {
        Self::Io(error)
    }
}

/// The host, without the brackets of an IPv6 address, and the port.
pub(super) fn split_host_port(address: &str) -> Result<(&str, u16), Fault> {
    let invalid = || Fault::config(format!("the hub's address {address:?} is not HOST:PORT"));
    let (host, port) = address.rsplit_once(':').ok_or_else(invalid)?;
    let bare = host
        .strip_prefix('[')
        .and_then(|host| host.strip_suffix(']'));
    let host = bare.unwrap_or(host);
    let odd = |c: char| c.is_whitespace() || c.is_control() || matches!(c, '/' | '@');
    // An IPv6 address has brackets.
    if host.is_empty() || host.contains(odd) || (bare.is_none() && host.contains(':')) {
        return Err(invalid());
    }
    match port.parse() {
        Ok(port) if port > 0 => Ok((host, port)),
        _ => Err(invalid()),
    }
}

fn decode_percent(text: &str) -> Result<String, String> {
    let invalid =
        || "the user name or password of the proxy is not valid percent-encoding".to_owned();
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        out.push(match byte {
            b'%' => {
                let mut digit = || char::from(bytes.next()?).to_digit(16);
                let (high, low) = (digit().ok_or_else(invalid)?, digit().ok_or_else(invalid)?);
                u8::try_from(high * 16 + low).map_err(|_| invalid())?
            }
            other => other,
        });
    }
    String::from_utf8(out).map_err(|_| invalid())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_of_proxies() {
        for (url, shown, user) in [
            ("http://proxy:3128", "http://proxy:3128", None),
            ("http://proxy/", "http://proxy:80", None),
            ("socks5://u@10.0.0.1", "socks5://10.0.0.1:1080", Some("u")),
            (
                "socks5h://a%40b:p%3aw@[fd00::1]:99",
                "socks5://[fd00::1]:99",
                Some("a@b"),
            ),
        ] {
            let proxy = Proxy::parse(url).unwrap();
            assert_eq!(
                (proxy.to_string().as_str(), proxy.user.as_deref()),
                (shown, user),
                "{url}"
            );
            assert!(!format!("{proxy:?}").contains("p:w"), "{proxy:?}");
        }
        assert!(
            Proxy::parse("http://u:secret@h:1")
                .unwrap()
                .has_password_text()
        );
        for wrong in [
            "proxy:3128",
            "https://proxy:1",
            "ftp://proxy:1",
            "http://",
            "http://secret@",
            "http://u:secret@h:0",
            "http://u:secret@h:70000",
            "http://u:secret%zz@h:1",
            "http://u:secret@h/x",
            &format!("http://{}", "x".repeat(PROXY_URL_BYTES_MAX)),
        ] {
            let why = Proxy::parse(wrong).unwrap_err();
            assert!(!why.contains("secret"), "{why}");
        }
    }
}
