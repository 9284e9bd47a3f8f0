//! What can be typed.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Parser, Subcommand, ValueEnum};

use super::train::{TrainCommand, Trainer};
use crate::config::{self, Config};
use base::fault::Fault;
use base::omitted::Category;

/// Carries datasets, labels, operator projects, images and models between a hub and many sites.
#[derive(Debug, Parser)]
#[command(name = "packhorse", version, subcommand_required = true, arg_required_else_help = true)]
#[command(after_help = "Exit codes: 0 done, 1 internal, 2 usage, 3 config, 4 not allowed, 5 not found, 6 conflict, 7 some \
                        sites failed, 8 integrity, 9 no space, 10 unreachable, 11 deadline passed.")]
pub struct Args {
    #[command(flatten)]
    pub(super) global: Global,
    #[command(subcommand)]
    pub(super) command: Command,
}

/// What every command takes.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct Global {
    /// How results are printed.
    #[arg(short, long, global = true, help_heading = "Everywhere", value_enum, default_value_t = Output::Table, value_name = "FORMAT")]
    pub(super) output: Output,
    /// The daemon's configuration: says where its API is and where its token lies.
    #[arg(long, global = true, help_heading = "Everywhere", env = "PACKHORSE_CONFIG", value_name = "FILE")]
    pub(super) config: Option<PathBuf>,
    /// The daemon's API, instead of the configuration's.
    #[arg(long, global = true, help_heading = "Everywhere", env = "PACKHORSE_API", value_name = "URL")]
    pub(super) api: Option<String>,
    /// A file with the API's token, instead of `<data_dir>/api-token`.
    #[arg(long, global = true, help_heading = "Everywhere", env = "PACKHORSE_TOKEN_FILE", value_name = "FILE")]
    pub(super) token_file: Option<PathBuf>,
}

impl Global {
    /// The path of the configuration, or why there must be one.
    pub(super) fn config_path(&self) -> Result<&Path, Fault> {
        let given = self.config.as_deref().filter(|path| !path.as_os_str().is_empty());
        given.ok_or_else(|| Fault::usage("no configuration is named").with_next("give --config FILE, or set PACKHORSE_CONFIG"))
    }

    /// The configuration with all checks, for a daemon.
    pub(super) fn load_config(&self) -> Result<Config, Fault> {
        config::load(self.config_path()?)
    }
}

/// How results are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Output {
    /// For people.
    Table,
    /// One JSON value.
    Json,
    /// One JSON object a line.
    Ndjson,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Run a hub and two sites on this machine, publish a sample of each kind, and show it arrive.
    Quickstart {
        /// Where it puts everything (default: a new temporary folder).
        #[arg(long)]
        dir: Option<PathBuf>,
        /// End when all arrived and is verified, instead of running on.
        #[arg(long)]
        once: bool,
    },
    /// Run the daemon; the configuration's role says hub or site.
    Serve {
        /// Stop when standard input ends too: for a parent that must not be outlived, however it dies.
        #[arg(long, hide = true)]
        until_stdin_ends: bool,
    },
    /// Make join tokens (at the hub).
    #[command(subcommand)]
    Token(TokenCommand),
    /// Enrol this site at the hub: pins the hub's CA, gets a certificate.
    Join {
        /// The hub's line.
        #[arg(long, value_name = "HOST:PORT", value_parser = config::parse_host_port)]
        hub: String,
        /// What `token create` printed. The environment keeps it out of the process list.
        #[arg(long, env = "PACKHORSE_JOIN_TOKEN", hide_env_values = true)]
        token: String,
    },
    /// Publish an artifact, at the hub or at a site.
    Publish(Box<Publish>),
    /// Deliver artifacts to sites, from wherever they are.
    Deliver(Deliver),
    /// Show transfers.
    Status(Status),
    /// List the artifacts.
    Artifacts,
    /// Show one artifact and where it went.
    Show {
        /// KIND/NAME:VERSION.
        #[arg(value_name = "REF")]
        artifact: String,
    },
    /// List the sites.
    Sites,
    /// Hold a transfer.
    Pause {
        /// A transfer's id, or a delivery's: then all of it.
        transfer: String,
    },
    /// Let a paused transfer go on.
    Resume {
        /// A transfer's id, or a delivery's: then all of it.
        transfer: String,
    },
    /// Give a transfer or a job up, and clean what it left.
    Cancel {
        /// A transfer's id; a delivery's: then all of it; or a job's: see 'packhorse jobs'.
        id: String,
    },
    /// List the jobs: publishes, imports, exports, verifications and collections.
    Jobs,
    /// Begin a failed or cancelled transfer again, where it stood.
    Retry {
        /// A transfer's id, or a delivery's: then all of it.
        transfer: String,
    },
    /// Training at another site: its runs.
    #[command(subcommand)]
    Train(TrainCommand),
    #[command(hide = true)]
    Trainer(Trainer),
    #[command(hide = true)]
    SampleTrainer {
        /// The run's descriptor.
        descriptor: PathBuf,
    },
    /// Say what a delivery would cost; sends nothing.
    Plan {
        /// KIND/NAME:VERSION, one or more.
        #[arg(value_name = "REF", required = true)]
        artifacts: Vec<String>,
        /// Names by comma, `all`, or a selector on labels (`region=west,line!=3`).
        #[arg(long, value_name = "SITES")]
        to: String,
    },
    /// Read again what this daemon holds of an artifact: store, NAS, rows, registry.
    Verify {
        /// KIND/NAME:VERSION.
        #[arg(value_name = "REF")]
        artifact: String,
        /// Fetch again what is bad.
        #[arg(long)]
        repair: bool,
        /// Compare names and sizes only, and read no content.
        #[arg(long)]
        quick: bool,
    },
    /// Keep what the hub holds of an artifact that lives at a site, whatever its age.
    Pin {
        /// KIND/NAME:VERSION.
        #[arg(value_name = "REF")]
        artifact: String,
    },
    /// Let it age again.
    Unpin {
        /// KIND/NAME:VERSION.
        #[arg(value_name = "REF")]
        artifact: String,
    },
    /// Write artifacts to one file, to be carried by hand.
    Export {
        /// KIND/NAME:VERSION, one or more.
        #[arg(value_name = "REF", required = true)]
        artifacts: Vec<String>,
        /// The file to write.
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
    },
    /// Read a file that `export` wrote.
    Import {
        /// The file.
        file: PathBuf,
    },
    /// Free what nothing refers to.
    Gc,
    /// The stores of a stopped daemon.
    #[command(subcommand)]
    Store(StoreCommand),
    /// Check the daemon's surroundings: disks, database, registry, line.
    Doctor,
    /// The configuration.
    #[command(subcommand)]
    Config(ConfigCommand),
}

impl Command {
    /// Whether this runs a daemon, which logs what it does.
    pub(super) fn is_daemon(&self) -> bool {
        matches!(self, Command::Serve { .. })
    }
}

#[derive(Debug, Subcommand)]
pub(super) enum TokenCommand {
    /// Make a join token for one site, or for one publisher; it works once.
    Create(TokenCreate),
}

#[derive(Debug, clap::Args)]
pub(super) struct TokenCreate {
    /// The site it is for.
    #[arg(long, value_name = "NAME", required_unless_present = "publisher")]
    pub(super) site: Option<String>,
    /// The publisher it is for: whoever publishes from another machine (`publish --hub`), and may do nothing else.
    #[arg(long, value_name = "NAME", conflicts_with_all = ["site", "labels"])]
    pub(super) publisher: Option<String>,
    /// A label that the site will have; may be given often.
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = key_value)]
    pub(super) labels: Vec<(String, String)>,
    /// How long it is good.
    #[arg(long, default_value = "24h", value_name = "DURATION", value_parser = config::parse_duration)]
    pub(super) ttl: Duration,
}

#[derive(Debug, Subcommand)]
pub(super) enum StoreCommand {
    /// Make a damaged or missing chunk index again from the packs. The daemon must be stopped.
    RebuildIndex,
}

#[derive(Debug, Subcommand)]
pub(super) enum ConfigCommand {
    /// Check a configuration, without contacting anybody.
    Check,
}

#[derive(Debug, clap::Args)]
pub(super) struct Publish {
    /// A path, registry://HOST/REPOSITORY:TAG, or at a site its label database: db:LABEL_SET:VERSION, db:'SELECT …'.
    pub(super) source: String,
    /// What to publish it as; kinds are dataset, labels, operator, image, model.
    #[arg(long = "as", value_name = "KIND/NAME:VERSION")]
    pub(super) as_ref: String,
    /// Deliver it at once: names by comma, `all`, or a selector on labels (`region=west,line!=3`).
    #[arg(long, value_name = "SITES")]
    pub(super) to: Option<String>,
    #[command(flatten)]
    pub(super) wait: Wait,
    /// Labels: the dataset version that they belong to.
    #[arg(long = "for", value_name = "dataset/NAME:VERSION")]
    pub(super) for_dataset: Option<String>,
    /// Labels: accept samples that the dataset lacks.
    #[arg(long)]
    pub(super) allow_missing: bool,
    /// Labels: coco, csv, jsonl, label_studio, voc or yolo; guessed when absent.
    #[arg(long)]
    pub(super) format: Option<String>,
    /// Labels: which column of a CSV or JSON Lines file holds what (sample_path=image), and path_strip, path_prefix; may be
    /// given often.
    #[arg(long = "column", value_name = "FIELD=COLUMN", value_parser = key_value, num_args = 1..)]
    pub(super) columns: Vec<(String, String)>,
    /// Refuse an input from which something would be left out (exit code 8). Without it, `publish` reports what it leaves out.
    #[arg(long)]
    pub(super) strict: bool,
    /// With --strict: categories that may be left out all the same. The refusal of --strict names them.
    #[arg(long, value_name = "CATEGORY", value_delimiter = ',')]
    pub(super) accept_omitted: Vec<Category>,
    /// The training run that made it: the model goes to the site that borrows.
    #[arg(long, value_name = "RUN", conflicts_with = "hub")]
    pub(super) run: Option<String>,
    /// With --hub, a registry: the user. A daemon takes user and password from its configuration: [registry."HOST"].
    #[arg(long, requires = "password_file")]
    pub(super) username: Option<String>,
    /// With --hub, a registry: a file that holds the password.
    #[arg(long, value_name = "FILE", requires = "username")]
    pub(super) password_file: Option<PathBuf>,
    /// Publish from this machine, which has no daemon, at the hub whose line this is: only what it lacks is sent.
    #[arg(long, value_name = "HOST:PORT", value_parser = config::parse_host_port)]
    pub(super) hub: Option<String>,
    /// With --hub, the first time: what `token create --publisher` printed; later it is left unused. The environment keeps it out of
    /// the process list.
    #[arg(long, env = "PACKHORSE_JOIN_TOKEN", hide_env_values = true, value_name = "TOKEN")]
    pub(super) join_token: Option<String>,
    /// With --hub: where this machine's certificate lies (default: ~/.local/share/packhorse).
    #[arg(long, value_name = "DIR", requires = "hub")]
    pub(super) state: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
pub(super) struct Deliver {
    /// KIND/NAME:VERSION, one or more.
    #[arg(value_name = "REF", required = true)]
    pub(super) artifacts: Vec<String>,
    /// Names by comma, `all`, or a selector on labels (`region=west,line!=3`).
    #[arg(long, value_name = "SITES")]
    pub(super) to: String,
    #[command(flatten)]
    pub(super) wait: Wait,
}

#[derive(Debug, clap::Args)]
pub(super) struct Wait {
    /// Wait for all transfers to end.
    #[arg(long)]
    pub(super) wait: bool,
    /// Stop waiting after this long (exit code 11); the work goes on.
    #[arg(long, value_name = "DURATION", value_parser = config::parse_duration)]
    pub(super) timeout: Option<Duration>,
}

#[derive(Debug, clap::Args)]
pub(super) struct Status {
    /// A transfer's id, or a delivery's.
    pub(super) transfer: Option<String>,
    /// Go on showing changes; for a named transfer until it ends.
    #[arg(long)]
    pub(super) watch: bool,
    /// Only what changed since this cursor (0: everything); says the next one on stderr.
    #[arg(long, value_name = "CURSOR")]
    pub(super) since: Option<u64>,
    /// At most this many.
    #[arg(long, default_value_t = base::limits::API_ROWS_DEFAULT, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..))]
    pub(super) limit: u32,
}

fn key_value(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.into(), value.into())),
        _ => Err("write it as KEY=VALUE".into()),
    }
}
