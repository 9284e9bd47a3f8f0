//! The connections of the API: over TCP, and over the local socket. Their number is limited, and
//! each phase of a request has a deadline.
//!
//! A connection counts as unfinished until it has presented the token. One address may have a few
//! of those, and the oldest is closed for a new one: slow or silent requests cannot exclude a
//! client with the token. The head of a request has a deadline (hyper's), a body has one (`body`),
//! and a connection without progress is closed ([`Idle`]).

use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::{Extension, Router};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpListener;
use tokio::time::{Instant, Sleep, sleep};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::local::LocalSocket;
use base::admission::{Permit, Pool};
use base::fault::Fault;
use base::limits::{
    API_CONNECTIONS_MAX, API_CONNECTIONS_PER_ADDRESS_MAX, API_HEAD_BYTES_MAX, API_HEAD_MAX,
    API_IDLE_MAX,
};
use base::open_files;
use base::tally::Tally;

/// After a failed accept (too many open files), the pause before the next.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The connection of a request.
#[derive(Clone)]
pub(super) struct Connection {
    /// The client: an address, or a user of this machine.
    pub(super) peer: Arc<str>,
    /// The local address; none on the local socket.
    pub(super) local: Option<SocketAddr>,
    place: Arc<Permit>,
}

impl Connection {
    /// A request over it has presented the token.
    pub(super) fn finish(&self) {
        self.place.finish();
    }
}

/// The shared state of all connections.
pub(super) struct Server {
    router: Router,
    stop: CancellationToken,
    tcp: Pool,
    local: Pool,
    unfinished: Tally,
    not_accepted: Tally,
    tasks: TaskTracker,
}

impl Server {
    /// A server of these routes, which ends its connections when `stop` is cancelled.
    pub(super) fn new(router: Router, stop: CancellationToken) -> Arc<Self> {
        let places_max = open_files::share(API_CONNECTIONS_MAX, 8);
        Arc::new(Self {
            router,
            stop,
            tcp: Pool::new(places_max),
            local: Pool::new(places_max),
            unfinished: Tally::new(
                "closed an API connection that had shown no token: too slow, idle, or the oldest of too many",
            ),
            not_accepted: Tally::new("accepting an API connection failed"),
            tasks: TaskTracker::new(),
        })
    }

    /// Accepts connections over TCP, without end.
    pub(super) async fn accept_tcp(self: &Arc<Self>, listener: &TcpListener) {
        loop {
            self.tcp.ready().await;
            let (stream, peer) = match listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    self.pause(&error).await;
                    continue;
                }
            };
            // Answers are small and complete: waiting to fill a packet only delays them.
            let _ = stream.set_nodelay(true);
            let place = self
                .tcp
                .enter_when_possible(Some(peer.ip().into()), API_CONNECTIONS_PER_ADDRESS_MAX)
                .await;
            let local = stream.local_addr().ok();
            let connection = Connection {
                peer: peer.to_string().into(),
                local,
                place: Arc::new(place),
            };
            self.tasks.spawn(self.clone().serve(stream, connection));
        }
    }

    /// Accepts connections over the local socket, without end.
    pub(super) async fn accept_local(self: &Arc<Self>, socket: Option<&LocalSocket>) {
        let Some(socket) = socket else {
            return std::future::pending().await;
        };
        loop {
            self.local.ready().await;
            let stream = match socket.accept().await {
                Ok(stream) => stream,
                Err(error) => {
                    self.pause(&error).await;
                    continue;
                }
            };
            let place = self
                .local
                .enter_when_possible(None, API_CONNECTIONS_MAX)
                .await;
            let peer = stream.peer_cred().map_or_else(
                |_| "local".into(),
                |peer| format!("local uid {}", peer.uid()),
            );
            let connection = Connection {
                peer: peer.into(),
                local: None,
                place: Arc::new(place),
            };
            self.tasks.spawn(self.clone().serve(stream, connection));
        }
    }

    async fn pause(&self, error: &io::Error) {
        let fault = Fault::io("accept", error);
        self.not_accepted
            .note(format_args!("{fault}; {}", fault.next));
        sleep(ACCEPT_PAUSE).await;
    }

    async fn serve(
        self: Arc<Self>,
        stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
        connection: Connection,
    ) {
        let router = self.router.clone().layer(Extension(connection.clone()));
        let mut builder = http1::Builder::new();
        builder
            .timer(TokioTimer::new())
            .header_read_timeout(API_HEAD_MAX)
            .max_buf_size(API_HEAD_BYTES_MAX);
        let mut served = pin!(builder.serve_connection(
            TokioIo::new(Idle::new(stream)),
            TowerToHyperService::new(router)
        ));
        let mut is_stopping = false;
        let ended = loop {
            tokio::select! {
                biased;
                () = connection.place.evicted() => break Err("newer connections took its place".to_owned()),
                ended = served.as_mut() => break match ended {
                    Err(error) if error.is_timeout() && !connection.place.is_finished() => Err("no request came in time".to_owned()),
                    Err(error) => {
                        tracing::debug!(peer = %connection.peer, %error, "an API connection ended");
                        Ok(())
                    }
                    Ok(()) => Ok(()),
                },
                () = self.stop.cancelled(), if !is_stopping => {
                    is_stopping = true;
                    served.as_mut().graceful_shutdown();
                }
            }
        };
        if let Err(why) = ended {
            self.unfinished
                .note(format_args!("{}: {why}", connection.peer));
        }
    }

    /// Ready when the last connection has ended.
    pub(super) async fn drained(&self) {
        self.tasks.close();
        self.tasks.wait().await;
    }
}

/// A stream that fails after a long time without progress.
struct Idle<T> {
    stream: T,
    idle: Pin<Box<Sleep>>,
}

impl<T> Idle<T> {
    fn new(stream: T) -> Self {
        Self {
            stream,
            idle: Box::pin(sleep(API_IDLE_MAX)),
        }
    }

    fn watch<R>(
        &mut self,
        cx: &mut Context<'_>,
        result: Poll<io::Result<R>>,
        has_moved: bool,
    ) -> Poll<io::Result<R>> {
        if has_moved {
            self.idle.as_mut().reset(Instant::now() + API_IDLE_MAX);
        } else if result.is_pending() && self.idle.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        result
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Idle<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, buf);
        let has_moved = buf.filled().len() > before;
        self.watch(cx, read, has_moved)
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Idle<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, buf);
        let has_moved = written.is_ready();
        self.watch(cx, written, has_moved)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        let has_moved = written.is_ready();
        self.watch(cx, written, has_moved)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}
