//! `packhorse quickstart`: a hub and two sites on this machine, as real processes with embedded
//! stores, in acts.
//!
//! The command line calls it; it is a client of the daemons like any other. Everything is in one
//! folder: the next run continues with what a killed run left, because publishing, joining and
//! delivering may all be repeated. The daemons end with this process, however it ends (`daemon`).

mod acts;
mod check;
mod daemon;
mod folder;
mod show;
mod trainer;

use std::path::PathBuf;

pub(crate) use self::trainer::run as train;

use tokio::signal::unix::{Signal, SignalKind, signal};

use self::acts::World;
use self::daemon::Daemons;
use self::folder::Folder;
use self::show::Show;
use base::fault::{Code, Fault, IoContext};

/// Runs it in `dir` (default: a new temporary folder), and then until Ctrl-C, or with `once` only
/// until everything arrived.
pub async fn run(dir: Option<PathBuf>, once: bool) -> Result<(), Fault> {
    let mut stop = Stop::listen()?;
    let folder = Folder::open(dir)?;
    let show = Show::new();
    show.say(&format!(
        "Packhorse on this machine: everything lies in {}",
        folder.path().display()
    ));
    let mut daemons = Daemons::default();
    let result = tokio::select! {
        biased;
        () = stop.asked() => Err(stopped_early(&folder)),
        result = play(&folder, &mut daemons, &show, once) => result,
    };
    let result = match result {
        Ok(()) if !once => {
            tokio::select! {
                () = stop.asked() => Ok(()),
                fault = daemons.one_ended() => Err(fault),
            }
        }
        other => other,
    };
    show.say("Stopping the daemons");
    daemons.stop().await;
    folder.leave(result.is_ok() && once, &show)?;
    result
}

/// All acts, one after the other.
async fn play(
    folder: &Folder,
    daemons: &mut Daemons,
    show: &Show,
    once: bool,
) -> Result<(), Fault> {
    let world = World::raise(folder, daemons, show).await?;
    let acts = async {
        acts::first_delivery(&world).await?;
        acts::second_version(&world).await?;
        acts::borrowed_training(&world).await?;
        acts::farewell(&world, once)
    };
    tokio::select! {
        result = acts => result,
        fault = daemons.one_ended() => Err(fault),
    }
}

fn stopped_early(folder: &Folder) -> Fault {
    let mut fault = Fault::internal("stopped before everything had arrived").with_next(format!(
        "run it again with --dir {}: it goes on where it stood",
        show::quoted(folder.path())
    ));
    fault.code = Code::Partial;
    fault
}

/// Ctrl-C or SIGTERM.
struct Stop {
    interrupt: Signal,
    terminate: Signal,
}

impl Stop {
    fn listen() -> Result<Self, Fault> {
        let interrupt = signal(SignalKind::interrupt()).at("listen for SIGINT")?;
        let terminate = signal(SignalKind::terminate()).at("listen for SIGTERM")?;
        Ok(Self {
            interrupt,
            terminate,
        })
    }

    async fn asked(&mut self) {
        tokio::select! { _ = self.interrupt.recv() => {} _ = self.terminate.recv() => {} }
    }
}
