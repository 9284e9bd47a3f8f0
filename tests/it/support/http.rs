//! Small HTTP servers inside a test.

use std::net::SocketAddr;
use std::thread;

use axum::Router;
use tokio::sync::oneshot;

/// A server that runs until it is dropped.
pub(crate) struct Serving {
    /// Its address.
    pub(crate) address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

/// Serves the router that `router` creates for the server's address, on a free port of 127.0.0.1.
pub(crate) fn serve(router: impl FnOnce(SocketAddr) -> Router) -> Serving {
    let (listener, _udp) = super::bound_port();
    listener.set_nonblocking(true).expect("set non-blocking");
    let address = listener.local_addr().expect("know the address");
    let router = router(address);
    let (stop, stopped) = oneshot::channel();
    let thread = thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("start a runtime");
        runtime.block_on(async {
            let listener = tokio::net::TcpListener::from_std(listener).expect("take the listener");
            // No graceful shutdown: a client's keep-alive connection must not delay the end of a
            // test.
            tokio::select! {
                result = async { axum::serve(listener, router).await } => result.expect("serve"),
                _ = stopped => {}
            }
        });
    });
    Serving {
        address,
        stop: Some(stop),
        thread: Some(thread),
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The user and password of a Basic `Authorization` header.
pub(crate) fn basic_auth(header: Option<&str>) -> Option<(String, String)> {
    use base64::Engine;
    let encoded = header?.strip_prefix("Basic ")?;
    let text = String::from_utf8(
        base64::engine::general_purpose::STANDARD
            .decode(encoded)
            .ok()?,
    )
    .ok()?;
    let (user, password) = text.split_once(':')?;
    Some((user.to_owned(), password.to_owned()))
}

/// The name and value pairs of a query string, decoded.
pub(crate) fn query_pairs(query: Option<&str>) -> Vec<(String, String)> {
    let url = reqwest::Url::parse(&format!("http://localhost/?{}", query.unwrap_or_default()))
        .expect("a query makes a URL");
    url.query_pairs()
        .map(|(name, value)| (name.into_owned(), value.into_owned()))
        .collect()
}
