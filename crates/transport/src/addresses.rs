//! The addresses of the hub: which ones a connection tries, and in which order.
//!
//! A configuration has one or more addresses `HOST:PORT`, the preferred one first. Each name is
//! resolved at each attempt to connect. Of one name, IPv6 and IPv4 addresses alternate (RFC 8305),
//! so that a broken family costs a moment and not a time limit.

use std::net::SocketAddr;

use tokio::time::timeout;

use super::proxy::{Proxy, ProxySettings, split_host_port};
use base::fault::Fault;
use base::limits::{CONNECTION_ADDRESSES_MAX, CONNECTION_HUBS_MAX, CONNECTION_RESOLVE_MAX};

/// One way to the hub.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Route<'a> {
    Direct(SocketAddr),
    /// Through a proxy, which resolves the name.
    Proxy {
        hub: &'a str,
        proxy: &'a Proxy,
    },
}

fn hubs(addresses: &str) -> impl Iterator<Item = &str> {
    addresses.split(',').map(str::trim)
}

/// Checks addresses of a hub, `HOST:PORT` or `[V6]:PORT`, separated by commas.
pub fn check(addresses: &str) -> Result<(), Fault> {
    if hubs(addresses).count() > CONNECTION_HUBS_MAX {
        return Err(Fault::config(format!(
            "there are more than {CONNECTION_HUBS_MAX} addresses of the hub"
        )));
    }
    hubs(addresses).try_for_each(|hub| split_host_port(hub).map(drop))
}

/// The routes to the hub, in the order in which they are tried. The error says why there is none.
pub(super) async fn routes<'a>(
    addresses: &'a str,
    proxies: &'a ProxySettings,
) -> Result<Vec<Route<'a>>, String> {
    let resolved = hubs(addresses)
        .take(CONNECTION_HUBS_MAX)
        .map(|hub| of_hub(hub, proxies));
    let (mut routes, mut failure) = (Vec::new(), None);
    for one in futures::future::join_all(resolved).await {
        match one {
            Ok(found) => {
                for route in found {
                    if !routes.contains(&route) {
                        routes.push(route);
                    }
                }
            }
            Err(why) => failure = failure.or(Some(why)),
        }
    }
    match (routes.is_empty(), failure) {
        (true, Some(why)) => Err(why),
        _ => Ok(routes),
    }
}

async fn of_hub<'a>(hub: &'a str, proxies: &'a ProxySettings) -> Result<Vec<Route<'a>>, String> {
    if let Some(proxy) = proxies.of_hub(hub) {
        return Ok(vec![Route::Proxy { hub, proxy }]);
    }
    let found = of_host(hub).await.map_err(|why| format!("{hub}: {why}"))?;
    Ok(found.into_iter().map(Route::Direct).collect())
}

/// The addresses of one `HOST:PORT`, the families in turn.
pub(super) async fn of_host(address: &str) -> Result<Vec<SocketAddr>, String> {
    let found = timeout(CONNECTION_RESOLVE_MAX, tokio::net::lookup_host(address))
        .await
        .map_err(|_| {
            format!(
                "the host name was not resolved within {} s",
                CONNECTION_RESOLVE_MAX.as_secs()
            )
        })?
        .map_err(|e| format!("the host name cannot be resolved: {e}"))?;
    let found = in_turn(found.collect());
    match found.is_empty() {
        true => Err("the host name has no address".into()),
        false => Ok(found),
    }
}

/// Each address once, the families in turn, beginning with the one that the resolver prefers.
fn in_turn(found: Vec<SocketAddr>) -> Vec<SocketAddr> {
    let mut unique: Vec<SocketAddr> = Vec::new();
    for address in found {
        if !unique.contains(&address) {
            unique.push(address);
        }
    }
    let prefers_v6 = unique.first().is_some_and(SocketAddr::is_ipv6);
    let (first, second): (Vec<_>, Vec<_>) = unique
        .into_iter()
        .partition(|address| address.is_ipv6() == prefers_v6);
    let (mut first, mut second) = (first.into_iter(), second.into_iter());
    let mut out = Vec::new();
    loop {
        let before = out.len();
        out.extend(first.next());
        out.extend(second.next());
        if out.len() == before || out.len() >= CONNECTION_ADDRESSES_MAX {
            out.truncate(CONNECTION_ADDRESSES_MAX);
            return out;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(list: &[&str]) -> Vec<SocketAddr> {
        list.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn the_families_take_turns() {
        let found = parsed(&[
            "[fd00::1]:1",
            "[fd00::2]:1",
            "[fd00::1]:1",
            "10.0.0.1:1",
            "10.0.0.2:1",
        ]);
        let expected = parsed(&["[fd00::1]:1", "10.0.0.1:1", "[fd00::2]:1", "10.0.0.2:1"]);
        assert_eq!(in_turn(found), expected);
        let found = parsed(&["10.0.0.1:1", "10.0.0.2:1", "10.0.0.3:1", "[fd00::1]:1"]);
        let expected = parsed(&["10.0.0.1:1", "[fd00::1]:1", "10.0.0.2:1", "10.0.0.3:1"]);
        assert_eq!(in_turn(found), expected);
        assert!(in_turn(Vec::new()).is_empty());
        let many: Vec<SocketAddr> = (1..50u8).map(|n| ([10, 0, 0, n], 1).into()).collect();
        assert_eq!(in_turn(many).len(), CONNECTION_ADDRESSES_MAX);
    }

    #[tokio::test]
    async fn several_addresses_keep_their_order_and_one_bad_name_prevents_none() {
        let none = ProxySettings::default();
        let list = "127.0.0.9:2, 127.0.0.1:1,no.such.name.invalid:3,127.0.0.9:2";
        assert_eq!(
            routes(list, &none).await.unwrap(),
            parsed(&["127.0.0.9:2", "127.0.0.1:1"])
                .into_iter()
                .map(Route::Direct)
                .collect::<Vec<_>>()
        );
        let why = routes("no.such.name.invalid:3", &none).await.unwrap_err();
        assert!(
            why.contains("no.such.name.invalid:3: the host name"),
            "{why}"
        );
        // A proxy resolves the name.
        let proxies = ProxySettings::of(Proxy::parse("http://p:1").unwrap());
        let found = routes("no.such.name.invalid:3", &proxies).await.unwrap();
        assert!(matches!(found[..], [Route::Proxy { .. }]), "{found:?}");
    }

    #[test]
    fn malformed_addresses_are_refused() {
        assert!(check("hub:7443").is_ok() && check("[::1]:7443, hub:1").is_ok());
        for wrong in [
            "",
            "hub",
            "hub:",
            "hub:x",
            ":1",
            "a:1,",
            "fd00::1:1",
            "a:0",
            "u@hub:1",
            "h\r\n:1",
            &"a:1,".repeat(9),
        ] {
            assert!(check(wrong).is_err(), "{wrong:?}");
        }
    }
}
