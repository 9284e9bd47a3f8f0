//! Which paths of the daemon's machine a request may read and write.
//!
//! The administrator of the machine may use any path but the daemon's own files. Every other holder
//! of a token reaches only what is below `[publish] roots`, a trainer the directory of its run too.
//! [`source::own::Own`] checks what was opened by its handle, so a link, or a directory that is
//! replaced meanwhile, makes no difference. Nothing is stored.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use serde::Serialize;

use crate::api::types::SourceOptions;
use crate::config::Config;
use base::fault::{Fault, IoContext};
use base::names::RunName;
use model::actor::Actor;
use source::own::{self, Own};

/// Which paths a request may read and write.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub enum Reach {
    /// Any: it comes from the administrator of this machine, or from the daemon itself.
    Machine,
    /// Those below `[publish] roots`.
    Roots,
    /// Those, and the directory of this training run.
    Run(RunName),
}

impl Reach {
    /// The reach of an actor at the API.
    pub fn of(actor: &Actor) -> Self {
        match actor {
            Actor::Admin => Self::Machine,
            Actor::Trainer(run) => Self::Run(run.clone()),
            Actor::Token(_) | Actor::Site(_) | Actor::Publisher(_) | Actor::Hub => Self::Roots,
        }
    }

    /// The paths of the daemon that are never a source, and for all but the administrator those
    /// outside the roots. Blocks.
    pub(crate) fn own(&self, config: &Config) -> Own {
        let mut roots = config.publish.roots.clone();
        match self {
            Self::Machine => return config.own(),
            Self::Roots => {}
            Self::Run(run) => roots.push(run.in_dir(&config.data_dir.join("runs"))),
        }
        config.own().within(&roots)
    }

    /// Refuses what a publish would write for somebody who may only read.
    pub(crate) fn check_options(&self, options: &SourceOptions) -> Result<(), Fault> {
        if *self != Self::Machine && options.bad_out.is_some() {
            return Err(only_the_administrator("--bad-out"));
        }
        Ok(())
    }

    /// Refuses an operation that writes to a path of its own choice.
    pub(crate) fn check_machine(&self, what: &str) -> Result<(), Fault> {
        if *self == Self::Machine {
            Ok(())
        } else {
            Err(only_the_administrator(what))
        }
    }
}

fn only_the_administrator(what: &str) -> Fault {
    Fault::not_allowed(format!(
        "{what} writes to a path of this machine, and the token is not the API token of the machine"
    ))
    .with_next(
        "run the command on the machine of the daemon, with the API token of <data_dir>/api-token",
    )
}

/// An open file or directory, and a path that leads to it whatever happens to its name.
#[derive(Debug)]
pub(crate) struct Pinned {
    path: PathBuf,
    _opened: File,
}

impl Pinned {
    /// The regular file at `path`, which may be read. Blocks.
    pub(crate) fn file(path: &Path, own: &Own) -> Result<Self, Fault> {
        own.check_path(path)?;
        let opened = own.open(path).map_err(|error| own::fault(path, &error))?;
        let path = PathBuf::from(format!("/proc/self/fd/{}", opened.as_raw_fd()));
        Ok(Self {
            path,
            _opened: opened,
        })
    }

    /// The new file `path` in a directory in which may be written. Blocks.
    pub(crate) fn new_file(path: &Path, own: &Own) -> Result<Self, Fault> {
        let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(Fault::usage(format!(
                "{} is not the path of a file",
                path.display()
            )));
        };
        own.check_path(folder)?;
        let opened = File::options()
            .read(true)
            .custom_flags(OFlags::DIRECTORY.bits() as i32)
            .open(folder)
            .at(format_args!("open {}", folder.display()))?;
        own.check_place(&opened)
            .map_err(|error| own::fault(folder, &error))?;
        let folder = PathBuf::from(format!("/proc/self/fd/{}", opened.as_raw_fd()));
        Ok(Self {
            path: folder.join(name),
            _opened: opened,
        })
    }

    /// The path, valid while this value exists.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// A fault that names this path names `shown` instead.
    pub(crate) fn named(&self, shown: &Path, mut fault: Fault) -> Fault {
        let (own, shown) = (self.path.display().to_string(), shown.display().to_string());
        fault.message = fault.message.replace(&own, &shown);
        fault.next = fault.next.replace(&own, &shown);
        fault
    }
}
