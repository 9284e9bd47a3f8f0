//! A proxy between a site and the hub: forwards UDP and TCP on one port, counts, throttles and
//! cuts.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use super::bound_port;

/// How long a socket of the proxy waits before it checks whether it is still needed.
const TICK: Duration = Duration::from_millis(100);

/// What a policer lets pass at once, in bytes.
const BUCKET: f64 = 30_000.0;
/// How long UDP to the site takes on a line with a policer.
const POLICED_DELAY: Duration = Duration::from_millis(30);

#[derive(Default)]
struct State {
    closed: AtomicBool,
    cut: AtomicBool,
    no_udp: AtomicBool,
    /// The bytes per second above which UDP to the site is dropped; 0: none.
    policed: AtomicU64,
    /// What the policer lets pass at once, and when that was.
    bucket: Mutex<Option<(f64, Instant)>>,
    /// Bytes per second to the site; 0: unlimited.
    rate: AtomicU64,
    /// The same to the hub.
    rate_up: AtomicU64,
    /// The total bytes to the site before the proxy holds the rest back; 0: no limit.
    hold_at: AtomicU64,
    /// The same to the hub.
    hold_up_at: AtomicU64,
    /// Bytes forwarded to the site.
    down: AtomicU64,
    /// Bytes forwarded to the hub.
    up: AtomicU64,
    /// When the next bytes may go to the site. All flows share this value, and so one rate.
    free_at: Mutex<Option<Instant>>,
    free_at_up: Mutex<Option<Instant>>,
    tcp: Mutex<Vec<TcpStream>>,
}

impl State {
    /// Waits until so many bytes may go to the site.
    fn pace(&self, bytes: usize) {
        self.hold(bytes, &self.hold_at, &self.down);
        Self::wait(bytes, &self.rate, &self.free_at);
    }

    /// The same to the hub.
    fn pace_up(&self, bytes: usize) {
        self.hold(bytes, &self.hold_up_at, &self.up);
        Self::wait(bytes, &self.rate_up, &self.free_at_up);
    }

    fn hold(&self, bytes: usize, at: &AtomicU64, carried: &AtomicU64) {
        let held = || {
            let at = at.load(Ordering::Relaxed);
            at > 0 && carried.load(Ordering::Relaxed) + bytes as u64 > at
        };
        while held() && !self.closed() {
            thread::sleep(TICK);
        }
    }

    fn wait(bytes: usize, rate: &AtomicU64, free_at: &Mutex<Option<Instant>>) {
        let rate = rate.load(Ordering::Relaxed);
        if rate == 0 {
            return;
        }
        let now = Instant::now();
        let until = {
            let mut free_at = free_at.lock().expect("no holder panics");
            let begin = free_at.map_or(now, |t| t.max(now));
            *free_at.insert(begin + Duration::from_nanos(bytes as u64 * 1_000_000_000 / rate))
        };
        // A short wait is skipped, because the sleep would last longer.
        if until > now + Duration::from_millis(2) {
            thread::sleep(until - now);
        }
    }

    fn cut(&self) -> bool {
        self.cut.load(Ordering::Relaxed)
    }

    fn drops_udp(&self) -> bool {
        self.cut() || self.no_udp.load(Ordering::Relaxed)
    }

    /// Whether the policer drops a packet of this size.
    fn is_policed(&self, bytes: usize) -> bool {
        let rate = self.policed.load(Ordering::Relaxed) as f64;
        let now = Instant::now();
        let mut bucket = self.bucket.lock().expect("no holder panics");
        let (left, at) = bucket.unwrap_or((BUCKET, now));
        let left = (left + now.duration_since(at).as_secs_f64() * rate).min(BUCKET);
        let passes = rate == 0.0 || left >= bytes as f64;
        let left = if passes { left - bytes as f64 } else { left };
        *bucket = Some((left, now));
        !passes
    }

    fn closed(&self) -> bool {
        self.closed.load(Ordering::Relaxed)
    }
}

/// A proxy to a hub. Sites connect to its [`Line::address`].
pub(crate) struct Line {
    address: SocketAddr,
    state: Arc<State>,
}

impl Line {
    /// Starts a proxy to `hub`.
    pub(crate) fn to(hub: SocketAddr) -> Self {
        let (tcp, udp) = bound_port();
        let address = tcp.local_addr().expect("know the address");
        let state = Arc::new(State::default());
        thread::spawn({
            let state = Arc::clone(&state);
            move || carry_udp(&udp, hub, &state)
        });
        thread::spawn({
            let state = Arc::clone(&state);
            move || carry_tcp(&tcp, hub, &state)
        });
        Self { address, state }
    }

    /// The address for sites.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Sets the bytes per second to the site; 0: unlimited.
    pub(crate) fn throttle(&self, bytes_per_second: u64) {
        self.state.rate.store(bytes_per_second, Ordering::Relaxed);
    }

    /// Sets the bytes per second to the hub; 0: unlimited.
    pub(crate) fn throttle_up(&self, bytes_per_second: u64) {
        self.state
            .rate_up
            .store(bytes_per_second, Ordering::Relaxed);
    }

    /// Forwards this many bytes to the site, counted from the start of the proxy, and holds the
    /// rest back until the number is changed; 0 holds nothing back. Both ends close a connection
    /// that is silent for half a minute.
    pub(crate) fn hold_at(&self, bytes: u64) {
        self.state.hold_at.store(bytes, Ordering::Relaxed);
    }

    /// The same to the hub.
    pub(crate) fn hold_up_at(&self, bytes: u64) {
        self.state.hold_up_at.store(bytes, Ordering::Relaxed);
    }

    /// Drops UDP to the site above this many bytes per second, and delays it: a long line with a
    /// policer. TCP is not limited.
    pub(crate) fn police_udp(&self, bytes_per_second: u64) {
        self.state
            .policed
            .store(bytes_per_second, Ordering::Relaxed);
    }

    /// Drops all packets in both directions, like a pulled cable.
    pub(crate) fn cut(&self) {
        self.state.cut.store(true, Ordering::Relaxed);
    }

    /// Drops UDP from now on and forwards TCP, as many firewalls do; or forwards both again.
    pub(crate) fn block_udp(&self, blocked: bool) {
        self.state.no_udp.store(blocked, Ordering::Relaxed);
    }

    /// Forwards again.
    pub(crate) fn mend(&self) {
        self.state.cut.store(false, Ordering::Relaxed);
    }

    /// Bytes forwarded to the site so far.
    pub(crate) fn down(&self) -> u64 {
        self.state.down.load(Ordering::Relaxed)
    }

    /// Bytes forwarded in both directions so far.
    pub(crate) fn carried(&self) -> u64 {
        self.up() + self.down()
    }

    /// Waits until the bytes to the site within a second are fewer than those of a transfer.
    #[track_caller]
    pub(crate) fn wait_quiet(&self, limit: Duration) {
        wait_quiet(limit, || self.down());
    }

    /// The same to the hub.
    #[track_caller]
    pub(crate) fn wait_quiet_up(&self, limit: Duration) {
        wait_quiet(limit, || self.up());
    }

    /// Bytes forwarded to the hub so far.
    pub(crate) fn up(&self) -> u64 {
        self.state.up.load(Ordering::Relaxed)
    }
}

#[track_caller]
fn wait_quiet(limit: Duration, carried: impl Fn() -> u64) {
    let mut since = (Instant::now(), carried());
    super::wait_for("the connection is quiet for a second", limit, || {
        if carried() > since.1 + 50_000 {
            since = (Instant::now(), carried());
        }
        (since.0.elapsed() > Duration::from_secs(1)).then_some(())
    });
}

impl Drop for Line {
    fn drop(&mut self) {
        self.state.closed.store(true, Ordering::Relaxed);
        for stream in self.state.tcp.lock().expect("no holder panics").drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

fn carry_udp(socket: &UdpSocket, hub: SocketAddr, state: &Arc<State>) {
    socket
        .set_read_timeout(Some(TICK))
        .expect("set a read timeout");
    // One socket to the hub for each peer, so that the hub can distinguish them.
    let mut peers: HashMap<SocketAddr, UdpSocket> = HashMap::new();
    let mut datagram = vec![0; 65_536];
    while !state.closed() {
        let Ok((len, peer)) = socket.recv_from(&mut datagram) else {
            continue;
        };
        if state.drops_udp() {
            continue;
        }
        let upstream = peers.entry(peer).or_insert_with(|| {
            let upstream =
                UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("bind a socket to the hub");
            upstream.connect(hub).expect("connect it");
            upstream
                .set_read_timeout(Some(TICK))
                .expect("set a read timeout");
            let (from, to) = (
                upstream.try_clone().expect("clone a socket"),
                socket.try_clone().expect("clone a socket"),
            );
            let state = Arc::clone(state);
            let (delay, delayed) = mpsc::channel::<(Instant, Vec<u8>)>();
            let slow = to.try_clone().expect("clone a socket");
            thread::spawn(move || {
                for (due, datagram) in delayed {
                    thread::sleep(due.saturating_duration_since(Instant::now()));
                    let _ = slow.send_to(&datagram, peer);
                }
            });
            thread::spawn(move || {
                let mut datagram = vec![0; 65_536];
                while !state.closed() {
                    let Ok(len) = from.recv(&mut datagram) else {
                        continue;
                    };
                    if state.drops_udp() || state.is_policed(len) {
                        continue;
                    }
                    state.pace(len);
                    state.down.fetch_add(len as u64, Ordering::Relaxed);
                    let datagram = &datagram[..len];
                    let _ = match state.policed.load(Ordering::Relaxed) {
                        0 => to.send_to(datagram, peer).is_ok(),
                        _ => delay
                            .send((Instant::now() + POLICED_DELAY, datagram.to_vec()))
                            .is_ok(),
                    };
                }
            });
            upstream
        });
        state.pace_up(len);
        state.up.fetch_add(len as u64, Ordering::Relaxed);
        let _ = upstream.send(&datagram[..len]);
    }
}

fn carry_tcp(listener: &TcpListener, hub: SocketAddr, state: &Arc<State>) {
    listener.set_nonblocking(true).expect("set non-blocking");
    while !state.closed() {
        let Ok((site, _)) = listener.accept() else {
            thread::sleep(TICK);
            continue;
        };
        if state.cut() {
            // The kernel has already accepted the connection; the proxy can only leave it
            // unanswered.
            state.tcp.lock().expect("no holder panics").push(site);
            continue;
        }
        let Ok(upstream) = TcpStream::connect(hub) else {
            continue;
        };
        for stream in [&site, &upstream] {
            stream.set_nonblocking(false).expect("set blocking");
            state
                .tcp
                .lock()
                .expect("no holder panics")
                .push(stream.try_clone().expect("clone a stream"));
        }
        for (from, to, towards_site) in [
            (
                site.try_clone().expect("clone a stream"),
                upstream.try_clone().expect("clone a stream"),
                false,
            ),
            (upstream, site, true),
        ] {
            let state = Arc::clone(state);
            thread::spawn(move || pump(from, to, towards_site, &state));
        }
    }
}

fn pump(mut from: TcpStream, mut to: TcpStream, towards_site: bool, state: &State) {
    let mut buffer = vec![0; 16_384];
    while let Ok(len) = from.read(&mut buffer) {
        // A cut proxy holds the bytes back; TCP would send them again after the cut.
        while state.cut() && !state.closed() {
            thread::sleep(TICK);
        }
        if len == 0 {
            break;
        }
        if towards_site {
            state.pace(len);
            state.down.fetch_add(len as u64, Ordering::Relaxed);
        } else {
            state.pace_up(len);
            state.up.fetch_add(len as u64, Ordering::Relaxed);
        }
        if to.write_all(&buffer[..len]).is_err() {
            break;
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}
