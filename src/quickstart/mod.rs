//! `packhorse quickstart`: a hub and two sites on this machine, as separate processes with embedded
//! stores.
//!
//! The command line calls this module. The module is a client of the daemons, like any other
//! client. All files are in one folder. After a kill, the next run in this folder continues,
//! because publishing, joining and delivering may be repeated. The daemons end together with this
//! process, even after a kill (`daemon`).

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

/// Runs the quickstart in `dir` (default: a new temporary folder). With `once` it ends when all
/// acts are complete, otherwise at Ctrl-C.
pub async fn run(dir: Option<PathBuf>, once: bool) -> Result<(), Fault> {
    let mut stop = Stop::listen()?;
    let folder = Folder::open(dir)?;
    let show = Show::new();
    show.say(&format!(
        "Packhorse quickstart: all files are in {}",
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

/// Runs all acts in order.
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
    let mut fault = Fault::internal("stopped before all artifacts had arrived").with_next(format!(
        "run it again with --dir {}: it resumes",
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
