//! A proxy on a real socket: HTTP `CONNECT` and SOCKS5, with or without a password.
//!
//! It serves a bounded number of connections and ends with its value.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;

/// The connections that one proxy serves.
const CONNECTIONS_MAX: usize = 64;
/// The longest head of a request.
const HEAD_BYTES_MAX: usize = 4096;

/// How a proxy answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Speaks {
    Http,
    Socks5,
}

#[derive(Default)]
struct State {
    is_closed: AtomicBool,
    /// The connections that were opened through the proxy.
    opened: AtomicUsize,
    /// Name and password, if they are required.
    password: Option<(String, String)>,
    /// The names that the proxy resolves, with their addresses; all others cannot be resolved.
    names: HashMap<String, SocketAddr>,
}

/// A proxy on a free port of this machine.
pub struct TestProxy {
    address: SocketAddr,
    state: Arc<State>,
}

impl TestProxy {
    /// Starts a proxy that resolves these names (`HOST:PORT`) only.
    pub fn start(
        speaks: Speaks,
        password: Option<(&str, &str)>,
        names: &[(&str, SocketAddr)],
    ) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(State {
            password: password.map(|(user, password)| (user.into(), password.into())),
            names: names
                .iter()
                .map(|(name, to)| ((*name).into(), *to))
                .collect(),
            ..State::default()
        });
        let shared = state.clone();
        thread::spawn(move || {
            for client in listener.incoming().take(CONNECTIONS_MAX) {
                if shared.is_closed.load(Ordering::Relaxed) {
                    return;
                }
                let (Ok(client), shared) = (client, shared.clone()) else {
                    continue;
                };
                thread::spawn(move || {
                    let _ = client.set_read_timeout(Some(Duration::from_secs(60)));
                    let _ = match speaks {
                        Speaks::Http => serve_http(client, &shared),
                        Speaks::Socks5 => serve_socks5(client, &shared),
                    };
                });
            }
        });
        Self { address, state }
    }

    /// `HOST:PORT`.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The connections that were opened through the proxy.
    pub fn opened(&self) -> usize {
        self.state.opened.load(Ordering::Relaxed)
    }
}

impl Drop for TestProxy {
    fn drop(&mut self) {
        self.state.is_closed.store(true, Ordering::Relaxed);
        // Ends the wait for the next client.
        let _ = TcpStream::connect(self.address);
    }
}

fn serve_http(mut client: TcpStream, state: &State) -> io::Result<()> {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") && head.len() < HEAD_BYTES_MAX {
        client.read_exact(&mut byte)?;
        head.push(byte[0]);
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    if let Some((user, password)) = &state.password {
        let expected = BASE64.encode(format!("{user}:{password}"));
        if !head.contains(&format!("Proxy-Authorization: Basic {expected}\r\n")) {
            return client.write_all(
                b"HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic realm=\"test\"\r\nContent-Length: 0\r\n\r\n",
            );
        }
    }
    let to = head
        .strip_prefix("CONNECT ")
        .and_then(|rest| rest.split(' ').next());
    let Some(upstream) = to.and_then(|to| open(to, state)) else {
        return client.write_all(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n");
    };
    client.write_all(b"HTTP/1.1 200 Connection established\r\nVia: test\r\n\r\n")?;
    carry(client, upstream)
}

fn serve_socks5(mut client: TcpStream, state: &State) -> io::Result<()> {
    let mut head = [0; 2];
    client.read_exact(&mut head)?;
    let mut methods = vec![0; usize::from(head[1])];
    client.read_exact(&mut methods)?;
    let method = if state.password.is_some() { 2 } else { 0 };
    if !methods.contains(&method) {
        return client.write_all(&[5, 0xff]);
    }
    client.write_all(&[5, method])?;
    if let Some((user, password)) = &state.password {
        let mut version = [0];
        client.read_exact(&mut version)?;
        let given = (read_text(&mut client)?, read_text(&mut client)?);
        if given != (user.clone(), password.clone()) {
            return client.write_all(&[1, 1]);
        }
        client.write_all(&[1, 0])?;
    }
    let mut request = [0; 4];
    client.read_exact(&mut request)?;
    let host = match request[3] {
        1 => {
            let mut ip = [0; 4];
            client.read_exact(&mut ip)?;
            Ipv4Addr::from(ip).to_string()
        }
        3 => read_text(&mut client)?,
        _ => return client.write_all(&[5, 8, 0, 1, 0, 0, 0, 0, 0, 0]),
    };
    let mut port = [0; 2];
    client.read_exact(&mut port)?;
    let to = format!("{host}:{}", u16::from_be_bytes(port));
    let Some(upstream) = open(&to, state) else {
        return client.write_all(&[5, 4, 0, 1, 0, 0, 0, 0, 0, 0]);
    };
    client.write_all(&[5, 0, 0, 1, 0, 0, 0, 0, 0, 0])?;
    carry(client, upstream)
}

/// A text behind its length, which is one byte.
fn read_text(client: &mut TcpStream) -> io::Result<String> {
    let mut len = [0];
    client.read_exact(&mut len)?;
    let mut text = vec![0; usize::from(len[0])];
    client.read_exact(&mut text)?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

fn open(to: &str, state: &State) -> Option<TcpStream> {
    let upstream = TcpStream::connect(state.names.get(to)?).ok()?;
    state.opened.fetch_add(1, Ordering::Relaxed);
    Some(upstream)
}

fn carry(client: TcpStream, upstream: TcpStream) -> io::Result<()> {
    client.set_read_timeout(None)?;
    let (mut from, mut to) = (client.try_clone()?, upstream.try_clone()?);
    let back = thread::spawn(move || {
        let (mut from, mut to) = (upstream, client);
        let _ = io::copy(&mut from, &mut to);
        let _ = to.shutdown(Shutdown::Both);
    });
    let _ = io::copy(&mut from, &mut to);
    let _ = to.shutdown(Shutdown::Both);
    let _ = back.join();
    Ok(())
}
