//! `access`: the access tokens of a daemon's API.

use std::time::Duration;

use clap::Subcommand;

use super::args::Global;
use super::client::Client;
use super::human;
use super::output::{self, Table, fields, one, rows};
use crate::api::types::{
    AccessQuery, AccessRotateRequest, AccessToken, AccessTokenReply, AccessTokenRequest,
};
use crate::config;
use base::fault::Fault;

#[derive(Debug, Subcommand)]
pub(super) enum AccessCommand {
    /// Create an access token, and print it: it is shown this once.
    #[command(after_help = "Examples:
  packhorse access create ci --role publisher --artifacts 'dataset/line3-*,model/*' --sites region=west
  packhorse access create hall-2 --role wall --ttl never")]
    Create(AccessCreate),
    /// List the access tokens, the expired and the revoked ones included.
    #[command(after_help = "Example:\n  packhorse access list")]
    List,
    /// Show one access token: role, scope, times. Its secret is stored nowhere.
    #[command(after_help = "Example:\n  packhorse access show ci")]
    Show {
        /// The name of the token.
        name: String,
    },
    /// Replace the secret of an access token, and print the new one. The old one ends at once.
    #[command(after_help = "Example:\n  packhorse access rotate ci")]
    Rotate {
        /// The name of the token.
        name: String,
        /// How long the new secret is valid [default: 90d; a token without expiry keeps none].
        #[arg(long, value_name = "DURATION", value_parser = config::parse_duration)]
        ttl: Option<Duration>,
    },
    /// Revoke an access token: its requests are refused, and its open streams end.
    #[command(after_help = "Example:\n  packhorse access revoke ci")]
    Revoke {
        /// The name of the token.
        name: String,
    },
}

#[derive(Debug, clap::Args)]
pub(super) struct AccessCreate {
    /// A unique name: [a-z0-9][a-z0-9._-]*.
    name: String,
    /// What the holder can do: viewer (read), publisher (also publish, deliver, train), operator
    /// (also pause, cancel, verify, export, gc), admin (everything), or wall (only what a wall
    /// screen shows).
    #[arg(long, value_name = "ROLE", value_parser = ["viewer", "publisher", "operator", "admin", "wall"])]
    role: String,
    /// The artifacts that exist for the holder, separated by commas: KIND/NAME with * for any
    /// characters, such as dataset/line3-*,model/* [default: all].
    #[arg(long, value_name = "PATTERN", value_delimiter = ',')]
    artifacts: Vec<String>,
    /// The sites that exist for the holder: names separated by commas, `all`, or a label selector
    /// [default: all].
    #[arg(long, value_name = "SITES")]
    sites: Option<String>,
    /// How long the token is valid; `never` for the role wall only.
    #[arg(long, default_value = "90d", value_name = "DURATION", value_parser = ttl)]
    ttl: Ttl,
}

/// The validity of a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ttl {
    For(Duration),
    Never,
}

fn ttl(text: &str) -> Result<Ttl, String> {
    match text {
        "never" => Ok(Ttl::Never),
        text => config::parse_duration(text).map(Ttl::For),
    }
}

/// `access …`
pub(super) async fn run(global: &Global, command: AccessCommand) -> Result<(), Fault> {
    let client = Client::new(global)?;
    // The token is alone on stdout, for TOKEN=$(packhorse access create …).
    let secret = |reply: &AccessTokenReply| format!("{}\n", reply.token);
    match command {
        AccessCommand::Create(create) => {
            let request = AccessTokenRequest {
                name: create.name,
                role: create.role.parse()?,
                artifacts: create.artifacts,
                sites: create.sites,
                ttl_seconds: match create.ttl {
                    Ttl::For(time) => Some(time.as_secs()),
                    Ttl::Never => None,
                },
                no_expiry: create.ttl == Ttl::Never,
            };
            let reply: AccessTokenReply = client.post("/v1/access", &request).await?;
            one(global.output, &reply, secret)
        }
        AccessCommand::List => {
            let tokens: Vec<AccessToken> = client.get("/v1/access", &()).await?;
            rows(global.output, &tokens, |tokens| {
                table(tokens, output::colour())
            })
        }
        AccessCommand::Show { name } => {
            let token: AccessToken = client.get("/v1/access/show", &AccessQuery { name }).await?;
            one(global.output, &token, detail)
        }
        AccessCommand::Rotate { name, ttl } => {
            let request = AccessRotateRequest {
                name,
                ttl_seconds: ttl.map(|time| time.as_secs()),
            };
            let reply: AccessTokenReply = client.post("/v1/access/rotate", &request).await?;
            one(global.output, &reply, secret)
        }
        AccessCommand::Revoke { name } => {
            let token: AccessToken = client.delete("/v1/access", &AccessQuery { name }).await?;
            one(global.output, &token, |token| {
                format!("the access token {} is revoked\n", token.name)
            })
        }
    }
}

fn time(text: Option<&String>, none: &str) -> String {
    text.map_or_else(|| none.to_owned(), |text| human::local(text))
}

fn artifacts(token: &AccessToken) -> String {
    match &token.artifacts[..] {
        [] => "all".into(),
        patterns => patterns.join(","),
    }
}

fn sites(token: &AccessToken) -> String {
    token.sites.clone().unwrap_or_else(|| "all".into())
}

fn table(tokens: &[AccessToken], colour: bool) -> String {
    if tokens.is_empty() {
        return "there are no access tokens\n".into();
    }
    let mut table = Table::new(&[
        "NAME",
        "ROLE",
        "STATE",
        "ARTIFACTS",
        "SITES",
        "EXPIRES",
        "LAST USED",
    ]);
    for token in tokens {
        table.row(vec![
            token.name.as_str().into(),
            token.role.as_str().into(),
            token.state.as_str().into(),
            artifacts(token).into(),
            sites(token).into(),
            time(token.expires_at.as_ref(), "never").into(),
            time(token.last_used.as_ref(), "never").into(),
        ]);
    }
    table.render(colour)
}

fn detail(token: &AccessToken) -> String {
    let mut pairs = vec![
        ("name", token.name.clone()),
        ("id", token.id.clone()),
        ("role", token.role.to_string()),
        ("state", token.state.clone()),
        ("artifacts", artifacts(token)),
        ("sites", sites(token)),
        (
            "created",
            format!(
                "{} by {}",
                human::local(&token.created_at),
                token.created_by
            ),
        ),
    ];
    if let Some(at) = &token.rotated_at {
        pairs.push(("rotated", human::local(at)));
    }
    pairs.push(("expires", time(token.expires_at.as_ref(), "never")));
    pairs.push(("last used", time(token.last_used.as_ref(), "never")));
    if let Some(at) = &token.revoked_at {
        pairs.push(("revoked", human::local(at)));
    }
    fields(&pairs)
}

#[cfg(test)]
mod tests {
    use super::*;
    use model::grant::Role;

    #[test]
    fn a_token_is_shown_with_its_scope_and_its_times() {
        let token = AccessToken {
            name: "ci".into(),
            id: "abc".into(),
            role: Role::Publisher,
            artifacts: vec!["dataset/line3-*".into(), "model/*".into()],
            sites: None,
            state: "valid".into(),
            created_at: "2026-11-23T10:00:00.000Z".into(),
            created_by: "admin".into(),
            rotated_at: None,
            expires_at: None,
            last_used: None,
            revoked_at: None,
        };
        let text = table(std::slice::from_ref(&token), false);
        let row: Vec<&str> = text.lines().nth(1).unwrap().split_whitespace().collect();
        assert_eq!(
            row,
            [
                "ci",
                "publisher",
                "valid",
                "dataset/line3-*,model/*",
                "all",
                "never",
                "never"
            ]
        );
        assert!(detail(&token).contains("by admin"));
        assert_eq!(table(&[], false), "there are no access tokens\n");
        assert_eq!(ttl("never"), Ok(Ttl::Never));
        assert_eq!(ttl("2d"), Ok(Ttl::For(Duration::from_secs(172_800))));
        assert!(ttl("soon").is_err());
    }
}
