//! What the holder of an access token of the API may do: its role, and the scope that limits it.
//!
//! The daemon makes a [`Grant`] of a stored token; [`crate::policy::may`] decides with it. Nothing
//! here does I/O.

use std::fmt;
use std::hash::{Hash, Hasher};
use std::str::FromStr;

use base::fault::Fault;
use base::names::SiteSelector;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::publisher_scope::ArtifactPattern;

/// The role of a token. `viewer`, `publisher`, `operator` and `admin` include each other in this
/// order; `wall` is separate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Read only what a wall screen shows.
    Wall,
    /// Read.
    Viewer,
    /// Publish, deliver, train.
    Publisher,
    /// Pause, resume, cancel, retry, verify, pin, export, import, gc.
    Operator,
    /// Tokens and sites.
    Admin,
}

impl Role {
    /// Every role.
    pub const ALL: [Self; 5] = [
        Self::Wall,
        Self::Viewer,
        Self::Publisher,
        Self::Operator,
        Self::Admin,
    ];

    /// The name in requests and in the catalogue.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Wall => "wall",
            Self::Viewer => "viewer",
            Self::Publisher => "publisher",
            Self::Operator => "operator",
            Self::Admin => "admin",
        }
    }

    /// Whether this role has the rights of `other`.
    pub fn includes(self, other: Self) -> bool {
        let rank = |role: Self| match role {
            Self::Wall => None,
            Self::Viewer => Some(1),
            Self::Publisher => Some(2),
            Self::Operator => Some(3),
            Self::Admin => Some(4),
        };
        match (rank(self), rank(other)) {
            (Some(own), Some(other)) => own >= other,
            _ => self == other,
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Role {
    type Err = Fault;

    fn from_str(text: &str) -> Result<Self, Fault> {
        let role = Self::ALL.into_iter().find(|role| role.as_str() == text);
        role.ok_or_else(|| {
            let shown: String = text.chars().take(40).collect();
            Fault::usage(format!("{shown:?} is not a role"))
                .with_next("use viewer, publisher, operator, admin or wall")
        })
    }
}

/// What a token is limited to. Objects outside do not exist for its holder.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GrantScope {
    /// `None`: any artifact.
    #[serde(default)]
    pub artifacts: Option<Vec<ArtifactPattern>>,
    /// `None`: any site.
    #[serde(default)]
    pub sites: Option<SiteSelector>,
}

impl GrantScope {
    /// Whether it limits anything.
    pub fn is_limited(&self) -> bool {
        self.artifacts.is_some() || self.sites.is_some()
    }
}

/// What the holder of a token may do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grant {
    /// The id of the token.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Its role.
    pub role: Role,
    /// Its scope.
    pub scope: GrantScope,
}

impl Hash for Grant {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.id.hash(state);
    }
}

/// As logs name it. It holds no secret: an id alone is not a token.
impl fmt::Display for Grant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "token {} ({})", self.name, self.id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_role_includes_those_before_it_and_wall_is_separate() {
        let order = [Role::Viewer, Role::Publisher, Role::Operator, Role::Admin];
        for (at, role) in order.iter().enumerate() {
            for (other_at, other) in order.iter().enumerate() {
                assert_eq!(role.includes(*other), at >= other_at, "{role} {other}");
            }
            assert!(!role.includes(Role::Wall) && !Role::Wall.includes(*role));
        }
        assert!(Role::Wall.includes(Role::Wall));
        for role in Role::ALL {
            assert_eq!(role.to_string().parse::<Role>().unwrap(), role);
        }
        assert!("Admin".parse::<Role>().is_err() && "".parse::<Role>().is_err());
    }

    #[test]
    fn a_scope_is_stored_as_it_is_written() {
        let scope = GrantScope {
            artifacts: Some(vec!["dataset/line3-*".parse().unwrap()]),
            sites: Some("region=west".parse().unwrap()),
        };
        let json = serde_json::to_string(&scope).unwrap();
        assert_eq!(
            json,
            r#"{"artifacts":["dataset/line3-*"],"sites":"region=west"}"#
        );
        assert_eq!(serde_json::from_str::<GrantScope>(&json).unwrap(), scope);
        assert!(scope.is_limited() && !GrantScope::default().is_limited());
        assert!(serde_json::from_str::<GrantScope>(r#"{"site":"all"}"#).is_err());
    }
}
