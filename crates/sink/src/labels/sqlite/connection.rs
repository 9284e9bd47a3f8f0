//! The file of the database and the connections to it: where it may be, how it is opened, and the one
//! connection that stays.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use sqlx::{ConnectOptions, Connection, SqliteConnection};

use super::Sqlite;
use base::fault::{Fault, IoContext, Reason};
use base::space::Space;

/// `f_type` of statfs(2) for NFS, SMB, CIFS and SMB2 (linux/magic.h).
const NETWORK_FILESYSTEMS: [(u32, &str); 4] = [
    (0x6969, "NFS"),
    (0x517b, "SMB"),
    (0xff53_4d42, "CIFS"),
    (0xfe53_4d42, "SMB"),
];

/// Device and inode.
pub(super) type FileId = (u64, u64);

fn file_id(file: &Path) -> Option<FileId> {
    let meta = std::fs::metadata(file).ok()?;
    Some((meta.dev(), meta.ino()))
}

impl Sqlite {
    /// The path in `sqlite:///path` or `sqlite:path`.
    pub(in crate::labels) fn file_of(url: &str) -> Result<PathBuf, Fault> {
        let path = url
            .strip_prefix("sqlite://")
            .or_else(|| url.strip_prefix("sqlite:"))
            .unwrap_or("");
        if path.starts_with('/') && !path.contains('?') {
            return Ok(path.into());
        }
        Err(Fault::config(format!(
            "the url of [sink.labels], {url:?}, does not name a file"
        ))
        .with_next("write it as sqlite:///absolute/path/labels.db"))
    }

    /// Rejects a network filesystem. If the directory does not exist, its nearest existing parent
    /// is checked.
    pub(super) fn check_filesystem(file: &Path) -> Result<(), Fault> {
        let mut folder = file.parent().unwrap_or(Path::new("/"));
        while !folder.exists() {
            folder = folder.parent().unwrap_or(Path::new("/"));
        }
        let stat = rustix::fs::statfs(folder)
            .map_err(std::io::Error::from)
            .at(format_args!(
                "determine the filesystem of {}",
                folder.display()
            ))?;
        // The field is signed or wider on some platforms; the numbers have 32 bits.
        let kind = stat.f_type as u32;
        match NETWORK_FILESYSTEMS.iter().find(|(magic, _)| *magic == kind) {
            None => Ok(()),
            Some((_, name)) => Err(Fault::config(format!(
                "{} is on {name}, where SQLite's locks do not work",
                file.display()
            ))
            .with_reason(Reason::SinkRefused)
            .with_next("move the file to a local disk, or configure PostgreSQL in [sink.labels]")),
        }
    }

    pub(super) fn check_room(file: &Path, room_bytes: u64) -> Result<(), Fault> {
        let folder = file.parent().unwrap_or(Path::new("/"));
        // Each page is written to the WAL and then to the file.
        let needed = room_bytes.saturating_mul(2);
        Space::check(
            folder,
            needed,
            1,
            format_args!("the label database {}", file.display()),
        )
    }

    pub(super) async fn connect(&self) -> Result<SqliteConnection, Fault> {
        let mut keeper = self.keeper.lock().await;
        if let Some((_, kept)) = &*keeper
            && self.id().await? != Some(*kept)
            && let Some((conn, _)) = keeper.take()
        {
            // The file was moved away. This connection must be closed before another file has its
            // name, because it removes the files beside the database by their names.
            let _ = conn.close().await;
        }
        drop(keeper);
        self.options
            .connect()
            .await
            .map_err(|e| self.fault("open", &e))
    }

    /// A connection for reading, if the tables exist.
    pub(super) async fn connect_existing(&self) -> Result<Option<SqliteConnection>, Fault> {
        let file = self.file.clone();
        if !self.threads.run(move || Ok(file.exists())).await? {
            return Ok(None);
        }
        let mut conn = self.connect().await?;
        let query = sqlx::query_scalar::<_, i64>(
            "SELECT count(*) FROM sqlite_schema WHERE name = 'label_active'",
        );
        let tables = query
            .fetch_one(&mut conn)
            .await
            .map_err(|e| self.fault("look up the tables", &e))?;
        Ok((tables == 1).then_some(conn))
    }

    /// The file that has the name of the database now.
    async fn id(&self) -> Result<Option<FileId>, Fault> {
        let file = self.file.clone();
        self.threads.run(move || Ok(file_id(&file))).await
    }

    /// Ends the use of a connection: the first one is kept.
    pub(super) async fn close(&self, conn: SqliteConnection) {
        let mut keeper = self.keeper.lock().await;
        if keeper.is_none()
            && let Ok(Some(id)) = self.id().await
        {
            *keeper = Some((conn, id));
            return;
        }
        // Everything is committed.
        let _ = conn.close().await;
    }
}
