//! Rules that the types of a [`Config`] cannot express, each with the place in the file.

use std::path::Path;

use super::{Config, MEMORY_BUDGET_BYTES_MIN, Role};
use crate::log_filter;
use base::limits::CHECK_EVERY_MIN;
use base::names::SiteSelector;
use transport::Proxy;

/// A broken rule.
#[derive(Debug)]
pub(super) struct Broken {
    /// Byte offset in the text.
    pub(super) offset: usize,
    /// The key and the problem.
    pub(super) message: String,
}

/// Checks all rules; `text` is the text of `config`.
pub(super) fn check(config: &Config, text: &str) -> Result<(), Broken> {
    let rules = Rules { text };
    match config.role {
        Role::Hub => rules.hub(config)?,
        Role::Site => rules.site(config)?,
    }
    rules.share(&config.share)?;
    for (host, registry) in &config.registry {
        rules.registry(host, registry)?;
    }
    if !config.listen.is_api_local() && !config.listen.api_without_tls {
        let why = "other machines could reach it, and the API has no TLS: use 127.0.0.1, or set api_without_tls = true";
        return rules.broken("listen.api", format!("{}: {why}", config.listen.api));
    }
    rules.absolute("data_dir", &config.data_dir)?;
    for root in &config.publish.roots {
        rules.absolute("publish.roots", root)?;
    }
    if let Some(Err(why)) = config.log.filter.as_deref().map(log_filter::parse) {
        return rules.broken("log.filter", format!("it is not a valid filter: {why}"));
    }
    if config.limits.memory < MEMORY_BUDGET_BYTES_MIN {
        return rules.broken(
            "limits.memory",
            format!("it must be {} MiB at least", MEMORY_BUDGET_BYTES_MIN >> 20),
        );
    }
    Ok(())
}

struct Rules<'a> {
    text: &'a str,
}

impl Rules<'_> {
    /// Refuses with the position of the key: `key: why`.
    fn broken<T>(&self, key: &str, why: impl std::fmt::Display) -> Result<T, Broken> {
        Err(Broken {
            offset: locate(self.text, key).unwrap_or(0),
            message: format!("{key}: {why}"),
        })
    }

    fn absent(&self, key: &str, why: &str) -> Result<(), Broken> {
        if locate(self.text, key).is_some() {
            self.broken(key, why)
        } else {
            Ok(())
        }
    }

    fn absolute(&self, key: &str, path: &Path) -> Result<(), Broken> {
        if path.is_absolute() {
            Ok(())
        } else {
            self.broken(key, format!("{path:?} is not an absolute path"))
        }
    }

    fn hub(&self, _config: &Config) -> Result<(), Broken> {
        self.absent("hub", "only a site has it; a hub dials nobody")?;
        self.absent("train", "only a site has it; sites train")?;
        self.absent(
            "share.check_every",
            "only a site has it; sites publish in place",
        )?;
        self.absent(
            "scrub",
            "only a site has it; a hub verifies its store by 'packhorse verify'",
        )?;
        self.absent("sink", "only a site has it; artifacts land at sites")
    }

    fn site(&self, config: &Config) -> Result<(), Broken> {
        self.absent("listen.quic", "only a hub has it; sites dial")?;
        self.absent(
            "quota",
            "only a hub has it; sites and publishers publish to it",
        )?;
        self.absent("identity", "only a hub has it; it issues the certificates")?;
        self.absent(
            "relay",
            "only a hub has it; bytes between sites pass through it",
        )?;
        let Some(hub) = &config.hub else {
            return self.broken("role", "a site needs [hub] with address = \"HOST:PORT\"");
        };
        if let Err(fault) = transport::check_addresses(&hub.address) {
            return self.broken("hub.address", fault.message);
        }
        self.proxy(hub)?;
        if let Some(files) = &config.sink.files {
            self.absolute("sink.files.root", &files.root)?;
            if files.root == config.data_dir {
                return self.broken("sink.files.root", "it must not be data_dir itself");
            }
        }
        if let Some(labels) = &config.sink.labels {
            self.labels(labels)?;
        }
        config
            .train
            .as_ref()
            .map_or(Ok(()), |train| self.train(train))?;
        config
            .sink
            .images
            .as_ref()
            .map_or(Ok(()), |images| self.images(images))
    }

    fn proxy(&self, hub: &super::Hub) -> Result<(), Broken> {
        let key = "hub.proxy";
        let proxy = match hub.proxy.as_deref() {
            None | Some("none") => {
                return match &hub.proxy_password_file {
                    Some(_) => self.broken("hub.proxy_password_file", "it needs hub.proxy"),
                    None => Ok(()),
                };
            }
            Some(url) => Proxy::parse(url),
        };
        let proxy = proxy.map_or_else(|why| self.broken(key, why), Ok)?;
        if proxy.has_password_text() {
            return self.broken(
                key,
                "a password does not belong in the URL; use hub.proxy_password_file",
            );
        }
        let Some(path) = &hub.proxy_password_file else {
            return Ok(());
        };
        if !proxy.has_user() {
            return self.broken(
                "hub.proxy_password_file",
                "it needs a user name in hub.proxy: http://USER@HOST:PORT",
            );
        }
        self.absolute("hub.proxy_password_file", path)
    }

    fn share(&self, share: &super::Share) -> Result<(), Broken> {
        for text in share.allow.iter().flatten() {
            if let Err(why) = text.parse::<SiteSelector>() {
                return self.broken("share.allow", why);
            }
        }
        if share.check_every < CHECK_EVERY_MIN {
            return self.broken(
                "share.check_every",
                format!("it must be {}s at least", CHECK_EVERY_MIN.as_secs()),
            );
        }
        Ok(())
    }

    fn train(&self, train: &super::Train) -> Result<(), Broken> {
        match (train.command.first(), &train.url) {
            (Some(_), Some(_)) => {
                return self.broken("train.url", "a command trains, or a platform: choose one");
            }
            (None, None) => {
                return self.broken(
                    "train",
                    "name who trains: command = [\"/PATH\", …] or url = \"http://…\"",
                );
            }
            (Some(program), None) => self.absolute("train.command", Path::new(program))?,
            (None, Some(url)) => {
                let rest = url
                    .strip_prefix("https://")
                    .or_else(|| url.strip_prefix("http://"));
                if rest.is_none_or(|rest| rest.is_empty() || rest.starts_with('/')) {
                    return self.broken("train.url", "write http://HOST/PATH or https://HOST/PATH");
                }
                if rest.is_some_and(|rest| rest.split('/').next().unwrap_or_default().contains('@'))
                {
                    return self.broken("train.url", "it must not hold a user or a password");
                }
            }
        }
        for text in &train.allow {
            match text.parse::<SiteSelector>() {
                Ok(SiteSelector::Labels(_)) => {
                    return self.broken(
                        "train.allow",
                        "write the names of sites, or \"all\": labels are assigned at the hub",
                    );
                }
                Ok(_) => {}
                Err(why) => return self.broken("train.allow", why),
            }
        }
        if train.at_once == Some(0) {
            self.broken("train.at_once", "it must be 1 at least")
        } else {
            Ok(())
        }
    }

    fn labels(&self, sink: &super::LabelsSink) -> Result<(), Broken> {
        let key = "sink.labels.url";
        if let Some(path) = sink.url.strip_prefix("sqlite://") {
            self.absolute(key, Path::new(path))?;
            return self.absent("sink.labels.password_file", "SQLite has no password");
        }
        let Some(rest) = sink
            .url
            .strip_prefix("postgres://")
            .or_else(|| sink.url.strip_prefix("postgresql://"))
        else {
            return self.broken(key, "write postgres://USER@HOST/DATABASE or sqlite:///PATH");
        };
        self.no_secret(key, rest, "sink.labels.password_file")?;
        sink.password_file
            .as_deref()
            .map_or(Ok(()), |p| self.absolute("sink.labels.password_file", p))
    }

    fn images(&self, sink: &super::ImagesSink) -> Result<(), Broken> {
        let key = "sink.images.url";
        let password = "sink.images.password_file";
        if let Some(path) = sink.url.strip_prefix("oci-layout:") {
            self.absolute(key, Path::new(path))?;
            for only_registry in [
                "username",
                "password_file",
                "ca_file",
                "realm_hosts",
                "insecure",
                "create_project",
            ] {
                self.absent(
                    &format!("sink.images.{only_registry}"),
                    "only a registry has it; this is an OCI layout folder",
                )?;
            }
            return Ok(());
        }
        let Some(rest) = sink
            .url
            .strip_prefix("https://")
            .or_else(|| sink.url.strip_prefix("http://"))
        else {
            return self.broken(
                key,
                "write https://HOST/PROJECT, http://HOST:PORT/PROJECT or oci-layout:/PATH",
            );
        };
        if rest.is_empty() || rest.starts_with('/') || rest.contains(['?', '#']) {
            return self.broken(
                key,
                "write https://HOST/PROJECT, with neither query nor fragment",
            );
        }
        if authority(rest).contains('@') {
            return self.broken(
                key,
                "credentials do not belong in the URL; use sink.images.username and password_file",
            );
        }
        match (&sink.username, &sink.password_file) {
            (Some(_), None) => {
                return self.broken("sink.images.username", format!("it needs {password}"));
            }
            (None, Some(_)) => return self.broken(password, "it needs sink.images.username"),
            _ => {}
        }
        if let Some(path) = &sink.password_file {
            self.absolute(password, path)?;
        }
        self.hosts("sink.images.realm_hosts", &sink.realm_hosts)?;
        sink.ca_file
            .as_deref()
            .map_or(Ok(()), |p| self.absolute("sink.images.ca_file", p))
    }

    fn registry(&self, host: &str, registry: &super::Registry) -> Result<(), Broken> {
        // The key has dots and is quoted: the error points at the table.
        let at =
            |key: &str, why: String| self.broken("registry", format!("\"{host}\".{key}: {why}"));
        self.hosts("registry", std::slice::from_ref(&host.to_owned()))?;
        match (&registry.username, &registry.password_file) {
            (Some(_), None) => return at("username", "it needs password_file".into()),
            (None, Some(_)) => return at("password_file", "it needs username".into()),
            _ => {}
        }
        if let Some(path) = [&registry.password_file, &registry.ca_file]
            .into_iter()
            .flatten()
            .find(|path| !path.is_absolute())
        {
            return at(
                "password_file or ca_file",
                format!("{path:?} is not an absolute path"),
            );
        }
        self.hosts("registry", &registry.realm_hosts)
    }

    /// Registries and their token services are named by `HOST` or `HOST:PORT`.
    fn hosts(&self, key: &str, hosts: &[String]) -> Result<(), Broken> {
        let wrong = |host: &&String| {
            host.is_empty()
                || !host
                    .chars()
                    .all(|c| c.is_ascii_alphanumeric() || ".-_:[]".contains(c))
        };
        match hosts.iter().find(wrong) {
            Some(host) => self.broken(
                key,
                format!("{host:?} is not HOST or HOST:PORT; write it without a scheme and a path"),
            ),
            None => Ok(()),
        }
    }

    /// Refuses `user:password@` and `?password=`: the configuration is often in a repository.
    fn no_secret(&self, key: &str, rest: &str, instead: &str) -> Result<(), Broken> {
        let in_user = authority(rest)
            .rsplit_once('@')
            .is_some_and(|(user, _)| user.contains(':'));
        if in_user || rest.contains("password=") {
            return self.broken(
                key,
                format!("a password does not belong in the URL; use {instead}"),
            );
        }
        Ok(())
    }
}

/// `user@host:port` of the text after `scheme://`.
fn authority(rest: &str) -> &str {
    rest.split(['/', '?', '#']).next().unwrap_or_default()
}

/// The byte offset of `a.b.c` in the text; `None` when it is absent.
fn locate(text: &str, key: &str) -> Option<usize> {
    let document = toml::de::DeTable::parse(text).ok()?;
    let mut table = document.get_ref();
    let mut parts = key.split('.').peekable();
    while let Some(part) = parts.next() {
        let (found, value) = table.iter().find(|(k, _)| k.get_ref() == part)?;
        if parts.peek().is_none() {
            return Some(found.span().start);
        }
        table = value.get_ref().as_table()?;
    }
    None
}
