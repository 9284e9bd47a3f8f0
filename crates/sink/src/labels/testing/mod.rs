//! Label databases of both engines, for the tests of this crate and of crates that use it.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    missing_docs,
    reason = "tests only"
)]

mod count;
pub mod server;
pub mod set;

use std::path::PathBuf;
use std::sync::Arc;

use sqlx::{AssertSqlSafe, Connection};

pub use self::count::count_labels;
use self::server::{PASSWORD, Server, server};
use super::{LabelsSink, open};
use crate::settings;

/// A sink with its own database, and direct access to that database.
pub struct Bench {
    pub sink: Arc<LabelsSink>,
    pub data: tempfile::TempDir,
    pub db: Db,
}

pub enum Db {
    Postgres(&'static Server, String),
    Sqlite(PathBuf),
}

impl Bench {
    pub async fn sqlite() -> Self {
        let data = tempfile::tempdir().unwrap();
        let sink = open(None, data.path()).unwrap();
        let db = Db::Sqlite(data.path().join("labels.db"));
        Self { sink, data, db }
    }

    pub async fn postgres() -> Self {
        let data = tempfile::tempdir().unwrap();
        let (server, database) = base::blocking::spawn(|| (server(), server().database()))
            .await
            .unwrap();
        let sink = open(
            Some(&postgres_config(server, "packhorse", &database, &data)),
            data.path(),
        )
        .unwrap();
        Self {
            sink,
            data,
            db: Db::Postgres(server, database),
        }
    }

    /// The name of a table or view in this engine.
    pub fn table(&self, name: &str) -> String {
        match &self.db {
            Db::Postgres(..) => format!("packhorse.{name}"),
            Db::Sqlite(_) => name.into(),
        }
    }

    /// Runs SQL directly. `{}` in it is replaced by the schema.
    pub async fn sql(&self, sql: &str) {
        let sql = sql.replace("{}", &self.table(""));
        match &self.db {
            Db::Postgres(server, database) => {
                server.psql(database, &sql);
            }
            Db::Sqlite(file) => {
                let mut conn =
                    sqlx::SqliteConnection::connect(&format!("sqlite://{}", file.display()))
                        .await
                        .unwrap();
                sqlx::raw_sql(AssertSqlSafe(sql))
                    .execute(&mut conn)
                    .await
                    .unwrap();
                conn.close().await.unwrap();
            }
        }
    }

    /// The single number that a query returns.
    pub async fn number(&self, sql: &str) -> i64 {
        let sql = sql.replace("{}", &self.table(""));
        match &self.db {
            Db::Postgres(server, database) => server.psql(database, &sql).parse().unwrap(),
            Db::Sqlite(file) => {
                let mut conn =
                    sqlx::SqliteConnection::connect(&format!("sqlite://{}", file.display()))
                        .await
                        .unwrap();
                let number = sqlx::query_scalar(AssertSqlSafe(sql))
                    .fetch_one(&mut conn)
                    .await
                    .unwrap();
                conn.close().await.unwrap();
                number
            }
        }
    }

    /// The number of annotations in the active version.
    pub async fn current(&self) -> i64 {
        self.number("SELECT count(*) FROM {}current_annotations WHERE label_set = 'aoi-line3'")
            .await
    }

    /// The number of rows that belong to no stored version.
    pub async fn leftovers(&self) -> i64 {
        self.number(
            "SELECT (SELECT count(*) FROM {}annotation WHERE version_id NOT IN (SELECT id FROM {}label_version))
                + (SELECT count(*) FROM {}version_sample WHERE version_id NOT IN (SELECT id FROM {}label_version))",
        )
        .await
    }
}

pub fn postgres_config(
    server: &Server,
    user: &str,
    database: &str,
    data: &tempfile::TempDir,
) -> settings::LabelsSink {
    let file = data.path().join("password");
    base::durable::replace_secret(&file, format!("{PASSWORD}\n").as_bytes()).unwrap();
    settings::LabelsSink {
        url: server.url(user, database),
        password_file: Some(file),
    }
}

/// Runs each of these tests, which take a [`Bench`], on both engines.
#[macro_export]
macro_rules! on_both {
    ($($name:ident),* $(,)?) => {
        mod on_postgres {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() { super::$name(super::Bench::postgres().await).await; })*
        }
        mod on_sqlite {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() { super::$name(super::Bench::sqlite().await).await; })*
        }
    };
}
