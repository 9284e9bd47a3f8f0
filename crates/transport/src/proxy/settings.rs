//! Which proxy is used for which hub: the configured one, or the one of the environment with its
//! exceptions.

use std::env;
use std::net::IpAddr;

use super::{Proxy, split_host_port};

/// Which proxy is used for which hub.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ProxySettings {
    proxy: Option<Proxy>,
    /// The destinations of `NO_PROXY`.
    direct: Vec<String>,
    /// Whether it is from the environment, which never means this machine.
    is_from_environment: bool,
}

impl ProxySettings {
    /// This proxy for every hub.
    pub fn of(proxy: Proxy) -> Self {
        Self {
            proxy: Some(proxy),
            ..Self::default()
        }
    }

    /// The proxy of `HTTPS_PROXY` or `ALL_PROXY`, except for the destinations of `NO_PROXY`; each
    /// also in lower case. A URL that cannot be used is logged, without its content, and ignored.
    pub fn from_environment() -> Self {
        Self::from_variables(|name| env::var(name).ok())
    }

    fn from_variables(variable: impl Fn(&str) -> Option<String>) -> Self {
        let either = |name: &str| {
            let found = variable(name).or_else(|| variable(&name.to_lowercase()));
            found.filter(|text| !text.trim().is_empty())
        };
        let proxy = ["HTTPS_PROXY", "ALL_PROXY"].into_iter().find_map(|name| {
            let parsed = Proxy::parse(either(name)?.trim());
            parsed
                .map_err(|why| tracing::warn!(variable = name, why, "a proxy is ignored"))
                .ok()
        });
        let direct = either("NO_PROXY").unwrap_or_default();
        let direct = direct.split(',').map(|entry| entry.trim().to_lowercase());
        Self {
            proxy,
            direct: direct.filter(|entry| !entry.is_empty()).collect(),
            is_from_environment: true,
        }
    }

    /// The proxy for the hub at `HOST:PORT`.
    pub fn of_hub(&self, hub: &str) -> Option<&Proxy> {
        let proxy = self.proxy.as_ref()?;
        let (host, port) = split_host_port(hub).ok()?;
        let host = host.to_lowercase();
        let is_here =
            host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback());
        if self.is_from_environment && is_here {
            return None;
        }
        let is_direct = self.direct.iter().any(|entry| is_match(entry, &host, port));
        (!is_direct).then_some(proxy)
    }
}

/// Whether an entry of `NO_PROXY` means this host: `*`, a name, a domain and its names, an address,
/// or a network; with or without a port.
fn is_match(entry: &str, host: &str, port: u16) -> bool {
    if entry == "*" {
        return true;
    }
    let ip = host.parse::<IpAddr>().ok();
    if let Some((network, bits)) = entry.split_once('/') {
        let (Ok(network), Ok(bits), Some(ip)) = (network.parse(), bits.parse(), ip) else {
            return false;
        };
        return is_in_network(ip, network, bits);
    }
    if let (Some(ip), Ok(entry)) = (ip, entry.parse::<IpAddr>()) {
        return ip == entry;
    }
    let name = match entry.rsplit_once(':') {
        Some((name, of)) if of.parse::<u16>().is_ok() => {
            if of.parse::<u16>() != Ok(port) {
                return false;
            }
            name
        }
        _ => entry,
    };
    let name = name.trim_start_matches('[').trim_end_matches(']');
    let domain = name.trim_start_matches("*.").trim_start_matches('.');
    host == domain
        || !domain.is_empty()
            && host
                .strip_suffix(domain)
                .is_some_and(|before| before.ends_with('.'))
}

fn is_in_network(ip: IpAddr, network: IpAddr, bits: u32) -> bool {
    let (ip, network, width) = match (ip, network) {
        (IpAddr::V4(ip), IpAddr::V4(network)) => {
            (u128::from(ip.to_bits()), u128::from(network.to_bits()), 32)
        }
        (IpAddr::V6(ip), IpAddr::V6(network)) => (ip.to_bits(), network.to_bits(), 128),
        _ => return false,
    };
    let dropped = u32::saturating_sub(width, bits);
    bits <= width
        && ip.checked_shr(dropped).unwrap_or(0) == network.checked_shr(dropped).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_names_a_proxy_and_exceptions() {
        let of = |variables: &[(&str, &str)]| {
            ProxySettings::from_variables(|name| {
                let found = variables.iter().find(|(of, _)| *of == name);
                found.map(|(_, value)| (*value).to_owned())
            })
        };
        assert_eq!(of(&[]).of_hub("hub:7443"), None);
        let all = of(&[
            ("all_proxy", "socks5://a:1"),
            (
                "NO_PROXY",
                ".corp, 10.0.0.0/8, one.example:7443, fd00::/16, 192.0.2.1",
            ),
        ]);
        for (hub, is_proxied) in [
            ("hub.example:7443", true),
            ("localhost:1", false),
            ("a.corp:1", false),
            ("corp:1", false),
            ("xcorp:1", true),
            ("10.9.9.9:1", false),
            ("11.9.9.9:1", true),
            ("ONE.example:7443", false),
            ("one.example:7444", true),
            ("[fd00::5]:1", false),
            ("[fe00::5]:1", true),
            ("192.0.2.1:1", false),
        ] {
            assert_eq!(all.of_hub(hub).is_some(), is_proxied, "{hub}");
        }
        let https = of(&[("HTTPS_PROXY", "http://b:2"), ("ALL_PROXY", "socks5://a:1")]);
        assert_eq!(https.of_hub("h:1").unwrap().to_string(), "http://b:2");
        let star = of(&[("HTTPS_PROXY", "http://b:2"), ("no_proxy", "*")]);
        assert_eq!(star.of_hub("h:1"), None);
        assert_eq!(of(&[("HTTPS_PROXY", "nonsense")]).of_hub("h:1"), None);
        let own = ProxySettings::of(Proxy::parse("http://b:2").unwrap());
        for here in ["localhost:1", "127.0.0.1:1", "[::1]:1"] {
            assert_eq!(https.of_hub(here), None, "{here}");
            assert!(own.of_hub(here).is_some(), "{here}");
        }
    }
}
