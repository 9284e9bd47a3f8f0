//! Access tokens in SQLite.

use async_trait::async_trait;
use base::clock;
use base::fault::Fault;

use super::{Sqlite, Write, fault};
use crate::access::{ACCESS_TOKENS_MAX, Access, AccessRow, no_access_token};
use crate::{json, malformed};

type Columns = (
    String,
    String,
    Vec<u8>,
    String,
    String,
    i64,
    String,
    Option<i64>,
    Option<i64>,
    Option<i64>,
    Option<i64>,
);

const TABLE: &str = "access_token";
const ALL: &str = "SELECT id, name, secret_hash, role, scope, created_ms, created_by, rotated_ms, expires_ms, used_ms, revoked_ms
     FROM access_token WHERE $1 IS NULL OR name = $1 ORDER BY name";

/// A row of [`ALL`].
fn row(
    (
        id,
        name,
        secret_hash,
        role,
        scope,
        created_ms,
        created_by,
        rotated_ms,
        expires_ms,
        used_ms,
        revoked_ms,
    ): Columns,
) -> Result<AccessRow, Fault> {
    Ok(AccessRow {
        secret_hash: secret_hash
            .try_into()
            .map_err(|_| malformed(TABLE, &name, "the hash has another length"))?,
        role: role.parse().map_err(|e| malformed(TABLE, &name, e))?,
        scope: serde_json::from_str(&scope).map_err(|e| malformed(TABLE, &name, e))?,
        id,
        name,
        created_ms,
        created_by,
        rotated_ms,
        expires_ms,
        used_ms,
        revoked_ms,
    })
}

impl Write {
    /// A token; not found if there is none of this name.
    async fn access_token(&mut self, name: &str) -> Result<AccessRow, Fault> {
        let found: Option<Columns> = sqlx::query_as(ALL)
            .bind(name)
            .fetch_optional(self.db())
            .await
            .map_err(fault)?;
        row(found.ok_or_else(|| no_access_token(name))?)
    }
}

#[async_trait]
impl Access for Sqlite {
    async fn access_tokens(&self) -> Result<Vec<AccessRow>, Fault> {
        let rows: Vec<Columns> = sqlx::query_as(ALL)
            .bind(None::<&str>)
            .fetch_all(self.read())
            .await
            .map_err(fault)?;
        rows.into_iter().map(row).collect()
    }

    async fn add_access_token(&self, new: &AccessRow) -> Result<(), Fault> {
        let mut write = self.begin().await?;
        sqlx::query("DELETE FROM access_token WHERE name = $1 AND revoked_ms IS NOT NULL")
            .bind(&new.name)
            .execute(write.db())
            .await
            .map_err(fault)?;
        let (same, all): (i64, i64) = sqlx::query_as(
            "SELECT COUNT(CASE WHEN name = $1 THEN 1 END), COUNT(*) FROM access_token",
        )
        .bind(&new.name)
        .fetch_one(write.db())
        .await
        .map_err(fault)?;
        if same > 0 {
            return Err(
                Fault::conflict(format!("there is an access token {} already", new.name))
                    .with_next("choose another name, or replace its secret with 'packhorse access rotate NAME'"),
            );
        }
        if all >= ACCESS_TOKENS_MAX {
            // The oldest revoked one makes room.
            let removed = sqlx::query(
                "DELETE FROM access_token WHERE id = (SELECT id FROM access_token WHERE revoked_ms IS NOT NULL ORDER BY revoked_ms LIMIT 1)",
            )
            .execute(write.db())
            .await
            .map_err(fault)?;
            if removed.rows_affected() == 0 {
                return Err(Fault::conflict(format!(
                    "this daemon has {all} access tokens, the largest number"
                ))
                .with_next(
                    "revoke those that are not used; 'packhorse access list' shows the last use",
                ));
            }
        }
        sqlx::query(
            "INSERT INTO access_token (id, name, secret_hash, role, scope, created_ms, created_by, rotated_ms, expires_ms, used_ms, revoked_ms)
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)",
        )
        .bind(&new.id)
        .bind(&new.name)
        .bind(&new.secret_hash[..])
        .bind(new.role.as_str())
        .bind(json("scope", &new.scope)?)
        .bind(new.created_ms)
        .bind(&new.created_by)
        .bind(new.rotated_ms)
        .bind(new.expires_ms)
        .bind(new.used_ms)
        .bind(new.revoked_ms)
        .execute(write.db())
        .await
        .map_err(fault)?;
        write.commit().await
    }

    async fn rotate_access_token(
        &self,
        name: &str,
        id: &str,
        secret_hash: &[u8; 32],
        expires_ms: Option<i64>,
    ) -> Result<AccessRow, Fault> {
        let mut write = self.begin().await?;
        if write.access_token(name).await?.revoked_ms.is_some() {
            return Err(
                Fault::conflict(format!("the access token {name} is revoked"))
                    .with_next("create a token of this name with 'packhorse access create'"),
            );
        }
        sqlx::query(
            "UPDATE access_token SET id = $1, secret_hash = $2, expires_ms = $3, rotated_ms = $4, used_ms = NULL WHERE name = $5",
        )
        .bind(id)
        .bind(&secret_hash[..])
        .bind(expires_ms)
        .bind(clock::now_ms())
        .bind(name)
        .execute(write.db())
        .await
        .map_err(fault)?;
        let row = write.access_token(name).await?;
        write.commit().await?;
        Ok(row)
    }

    async fn revoke_access_token(&self, name: &str) -> Result<AccessRow, Fault> {
        let mut write = self.begin().await?;
        sqlx::query(
            "UPDATE access_token SET revoked_ms = $1 WHERE name = $2 AND revoked_ms IS NULL",
        )
        .bind(clock::now_ms())
        .bind(name)
        .execute(write.db())
        .await
        .map_err(fault)?;
        let row = write.access_token(name).await?;
        write.commit().await?;
        Ok(row)
    }

    async fn access_tokens_used(&self, used: &[(String, i64)]) -> Result<(), Fault> {
        let mut write = self.begin().await?;
        for (id, at_ms) in used {
            sqlx::query("UPDATE access_token SET used_ms = $1 WHERE id = $2")
                .bind(at_ms)
                .bind(id)
                .execute(write.db())
                .await
                .map_err(fault)?;
        }
        write.commit().await
    }
}
