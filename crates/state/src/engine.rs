//! What a database must provide: one trait for each subject, which stores and returns rows, and
//! [`Engine`], which combines them.
//!
//! SQLite implements them (`sqlite`). The parts that are common to all databases are in
//! [`Catalogue`](crate::Catalogue): wake-ups, the calls of the transfer state machine, pages, and
//! the meaning of rows. `conformance` tests any engine.
//!
//! Guarantees of an engine:
//! - A method that writes is one transaction, durable when the method returns.
//! - A transaction takes its event numbers from a counter row that stays locked until its commit.
//!   So numbers become visible in their order, and a reader that continues after a number misses no
//!   event.
//! - After the commit it wakes the subjects of the transaction ([`Common::wakes`]).
//! - A list skips a row that cannot be read and reports it ([`Common::malformed`]), unless its
//!   documentation says otherwise.

use std::sync::Arc;

use async_trait::async_trait;

use crate::access::Access;
use crate::artifacts::Artifacts;
use crate::changed::InPlace;
use crate::deliveries::Deliveries;
use crate::events::Events;
use crate::malformed::MalformedRows;
use crate::members::Members;
use crate::relay::Relay;
use crate::runs::Runs;
use crate::sites::Sites;
use crate::transfers::Transfers;
use crate::wake::Wakes;

/// What the catalogue gives to its engine.
#[derive(Debug, Default)]
pub(crate) struct Common {
    /// The tasks to wake after a commit.
    pub(crate) wakes: Arc<Wakes>,
    /// The rows that could not be read.
    pub(crate) malformed: MalformedRows,
}

/// A database that holds a catalogue.
#[async_trait]
pub trait Engine:
    Artifacts + InPlace + Sites + Members + Transfers + Deliveries + Relay + Runs + Events + Access
{
    /// Closes the database.
    async fn close(&self);

    /// How many statements read from the database since it was opened, those of transactions
    /// excluded.
    fn reads(&self) -> u64;
}

/// A row of a list that is read row by row.
#[derive(Debug)]
pub enum Listed<T> {
    /// The row.
    Row(T),
    /// A row that cannot be read, and was reported.
    Malformed {
        /// The key after which the list continues.
        key: String,
        /// Its event number, where the list has one.
        cursor: i64,
    },
}

/// Takes the rows of a list one by one; `false` ends the list.
pub type See<'a, T> = &'a mut (dyn FnMut(Listed<T>) -> bool + Send);
