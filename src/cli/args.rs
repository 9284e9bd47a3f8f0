//! The commands and options of the program. Help, shell completions and man pages are all made from
//! these definitions.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Parser, Subcommand, ValueEnum};
use clap_complete::Shell;

use super::access::AccessCommand;
use super::members::{PublisherCommand, SiteCommand};
use super::train::{TrainCommand, Trainer};
use crate::config::{self, Config};
use base::fault::Fault;
use base::omitted::Category;

/// Distribute datasets, labels, operator projects, images and models from a hub to many sites.
#[derive(Debug, Parser)]
#[command(name = "packhorse", version = env!("PACKHORSE_BUILD"), subcommand_required = true, arg_required_else_help = true)]
#[command(after_help = "Examples:
  packhorse quickstart --once
  packhorse publish /data/line3 --as dataset/line3:v1 --to all --wait
  packhorse status

Exit codes: 0 done, 1 internal, 2 usage, 3 config, 4 not allowed, 5 not found, 6 conflict, 7 some sites failed, 8 integrity, \
                        9 no space, 10 unreachable, 11 deadline passed.")]
pub struct Args {
    #[command(flatten)]
    pub(super) global: Global,
    #[command(subcommand)]
    pub(super) command: Command,
}

impl Args {
    /// Whether this runs a daemon, which SIGHUP does not end.
    pub fn is_daemon(&self) -> bool {
        matches!(self.command, Command::Serve { .. })
    }
}

/// The options of every command.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct Global {
    /// Format of the results.
    #[arg(short, long, global = true, help_heading = GLOBAL, value_enum, default_value_t = Output::Table, value_name = "FORMAT")]
    pub(super) output: Output,
    /// The daemon's configuration file; the command reads the API address and the token from it.
    #[arg(long, global = true, help_heading = GLOBAL, env = "PACKHORSE_CONFIG", value_name = "FILE")]
    pub(super) config: Option<PathBuf>,
    /// Address of the daemon's API; takes precedence over --config.
    #[arg(long, global = true, help_heading = GLOBAL, env = "PACKHORSE_API", value_name = "URL")]
    pub(super) api: Option<String>,
    /// A file with the API token; takes precedence over `<data_dir>/api-token`.
    #[arg(long, global = true, help_heading = GLOBAL, env = "PACKHORSE_TOKEN_FILE", value_name = "FILE")]
    pub(super) token_file: Option<PathBuf>,
}

const GLOBAL: &str = "Options of every command";

impl Global {
    /// The path of the configuration file, or the fault of a command that needs one.
    pub(super) fn config_path(&self) -> Result<&Path, Fault> {
        let given = self
            .config
            .as_deref()
            .filter(|path| !path.as_os_str().is_empty());
        given.ok_or_else(|| {
            Fault::usage("no configuration file is specified")
                .with_next("give --config FILE, or set PACKHORSE_CONFIG")
        })
    }

    /// The configuration with all checks, for a daemon.
    pub(super) fn load_config(&self) -> Result<Config, Fault> {
        config::load(self.config_path()?)
    }
}

/// Format of the results.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Output {
    /// Text and tables, for people.
    Table,
    /// One JSON value.
    Json,
    /// One JSON object per line.
    Ndjson,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Run a hub and two sites on this machine, publish a sample of each kind, and show that it
    /// arrives.
    #[command(after_help = "Example:\n  packhorse quickstart --dir /tmp/q --once")]
    Quickstart {
        /// The directory for everything [default: a new temporary directory].
        #[arg(long)]
        dir: Option<PathBuf>,
        /// End when everything has arrived and is verified; without it, keep running.
        #[arg(long)]
        once: bool,
    },
    /// Run the daemon; `role` in the configuration selects hub or site.
    #[command(after_help = "Example:\n  packhorse serve --config /etc/packhorse/hub.toml")]
    Serve {
        /// Also stop when standard input ends, so that the daemon never outlives the process that
        /// started it.
        #[arg(long, hide = true)]
        until_stdin_ends: bool,
    },
    /// Create join tokens, at the hub.
    #[command(
        subcommand,
        after_help = "Example:\n  packhorse token create --site chengdu --label region=west"
    )]
    Token(TokenCommand),
    /// Create, list and end access tokens of the daemon's API, at the hub or at a site.
    #[command(
        subcommand,
        after_help = "Example:\n  packhorse access create dashboard --role viewer --ttl 90d"
    )]
    Access(AccessCommand),
    /// Enrol this site at the hub: pin the hub's CA and obtain a certificate.
    #[command(
        after_help = "Example:\n  packhorse join --config /etc/packhorse/site.toml --hub hub.example.com:7443 --token TOKEN"
    )]
    Join {
        /// Address of the hub; several are separated by commas, the preferred one first.
        #[arg(long, value_name = "HOST:PORT", value_parser = config::parse_host_port)]
        hub: String,
        /// The output of `token create`. The environment variable keeps it out of the process list.
        #[arg(long, env = "PACKHORSE_JOIN_TOKEN", hide_env_values = true)]
        token: String,
    },
    /// Publish an artifact, at the hub or at a site.
    #[command(after_help = "Examples:
  packhorse publish /data/line3 --as dataset/line3:v1 --to region=west --wait
  packhorse publish /data/line3.json --as labels/line3:v1 --for dataset/line3:v1
  packhorse publish registry://harbor.example.com/operators/adc:v2 --as image/adc:v2
  packhorse publish /data/line3 --as dataset/line3:v1 --hub hub.example.com:7443")]
    Publish(Box<Publish>),
    /// Deliver artifacts to sites.
    #[command(
        after_help = "Example:\n  packhorse deliver dataset/line3:v1 labels/line3:v1 --to chengdu,xian --wait"
    )]
    Deliver(Deliver),
    /// Show transfers.
    #[command(after_help = "Examples:
  packhorse status
  packhorse status t-1a22c0d36922fc2d20c --watch
  packhorse status --since 0 -o ndjson")]
    Status(Status),
    /// List the artifacts.
    #[command(after_help = "Example:\n  packhorse artifacts")]
    Artifacts,
    /// Show one artifact and its transfers.
    #[command(after_help = "Example:\n  packhorse show dataset/line3:v1")]
    Show {
        /// KIND/NAME:VERSION.
        #[arg(value_name = "REF")]
        artifact: String,
    },
    /// List the sites.
    #[command(after_help = "Example:\n  packhorse sites")]
    Sites,
    /// Show, relabel, revoke, restore or remove a site, at the hub.
    #[command(
        subcommand,
        after_help = "Examples:\n  packhorse site set chengdu --label region=west\n  packhorse site revoke chengdu"
    )]
    Site(SiteCommand),
    /// Show, revoke, restore or remove a publisher, at the hub.
    #[command(
        subcommand,
        after_help = "Example:\n  packhorse publisher revoke office"
    )]
    Publisher(PublisherCommand),
    /// Hold a transfer; its progress is kept.
    #[command(after_help = "Example:\n  packhorse pause t-1a22c0d36922fc2d20c")]
    Pause {
        /// Id of a transfer, or of a delivery for all its transfers.
        #[arg(value_name = "ID")]
        transfer: String,
    },
    /// Continue a paused transfer.
    #[command(after_help = "Example:\n  packhorse resume t-1a22c0d36922fc2d20c")]
    Resume {
        /// Id of a transfer, or of a delivery for all its transfers.
        #[arg(value_name = "ID")]
        transfer: String,
    },
    /// Stop a transfer or a job, and remove what it staged.
    #[command(after_help = "Examples:
  packhorse cancel t-1a22c0d36922fc2d20c
  packhorse cancel j-1a22c0d3594b401d0e2")]
    Cancel {
        /// Id of a transfer, of a delivery for all its transfers, or of a job (see 'packhorse
        /// jobs').
        id: String,
    },
    /// List the jobs: publishes, imports, exports, verifications and garbage collections.
    #[command(after_help = "Example:\n  packhorse jobs")]
    Jobs,
    /// Start a failed or cancelled transfer again from its last committed position; verify a done
    /// one.
    #[command(after_help = "Example:\n  packhorse retry t-1a22c0d36922fc2d20c")]
    Retry {
        /// Id of a transfer, or of a delivery for all its transfers.
        #[arg(value_name = "ID")]
        transfer: String,
    },
    /// Train at another site: start, show and end training runs.
    #[command(
        subcommand,
        after_help = "Examples:\n  packhorse train list\n  packhorse train show line3-7"
    )]
    Train(TrainCommand),
    #[command(hide = true)]
    Trainer(Trainer),
    #[command(hide = true)]
    SampleTrainer {
        /// The run's descriptor.
        descriptor: PathBuf,
    },
    /// Report what a delivery would transfer; transfers nothing.
    #[command(after_help = "Example:\n  packhorse plan dataset/line3:v2 --to all")]
    Plan {
        /// KIND/NAME:VERSION; one or more.
        #[arg(value_name = "REF", required = true)]
        artifacts: Vec<String>,
        /// The sites: names separated by commas, `all`, or a label selector
        /// (`region=west,line!=3`).
        #[arg(long, value_name = "SITES")]
        to: String,
    },
    /// Read again what this daemon holds of an artifact (store, NAS, database, registry) and report
    /// differences.
    #[command(after_help = "Examples:
  packhorse verify dataset/line3:v1
  packhorse verify dataset/line3:v1 --repair --config /etc/packhorse/site.toml")]
    Verify {
        /// KIND/NAME:VERSION.
        #[arg(value_name = "REF")]
        artifact: String,
        /// Fetch missing or damaged content again; at a site.
        #[arg(long)]
        repair: bool,
        /// Compare names and sizes only; read no content.
        #[arg(long)]
        quick: bool,
    },
    /// Keep what the hub holds of an artifact that was published at a site, regardless of its age.
    #[command(after_help = "Example:\n  packhorse pin dataset/local:v1")]
    Pin {
        /// KIND/NAME:VERSION.
        #[arg(value_name = "REF")]
        artifact: String,
    },
    /// Undo `pin`: the content can be removed again when it is old.
    #[command(after_help = "Example:\n  packhorse unpin dataset/local:v1")]
    Unpin {
        /// KIND/NAME:VERSION.
        #[arg(value_name = "REF")]
        artifact: String,
    },
    /// Write artifacts to one file, which can be carried to another hub.
    #[command(
        after_help = "Example:\n  packhorse export dataset/line3:v1 labels/line3:v1 --out /media/disk/line3.bundle"
    )]
    Export {
        /// KIND/NAME:VERSION; one or more.
        #[arg(value_name = "REF", required = true)]
        artifacts: Vec<String>,
        /// The file to write; it must not exist.
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
    },
    /// Write labels to a directory, in a format of annotation tools, at the hub or at a site that
    /// holds them.
    #[command(
        after_help = "Example:\n  packhorse export-labels labels/line3:v1 --format coco --out /data/line3-v1"
    )]
    ExportLabels {
        /// labels/NAME:VERSION.
        #[arg(value_name = "REF")]
        artifact: String,
        /// The format. What it cannot hold is reported.
        #[arg(long, value_parser = source::labels::export::ExportFormat::WORDS)]
        format: String,
        /// The directory to write; it must not exist. The daemon writes it.
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
    },
    /// Read a file that `export` wrote.
    #[command(after_help = "Example:\n  packhorse import /media/disk/line3.bundle")]
    Import {
        /// The file.
        file: PathBuf,
    },
    /// Take up what the NAS of this site already holds: check versions that lost their record, and
    /// record the content of versions that the site does not know. Transfers nothing.
    #[command(after_help = "Example:\n  packhorse adopt --config /etc/packhorse/site.toml")]
    Adopt,
    /// Remove chunks that no artifact refers to.
    #[command(after_help = "Example:\n  packhorse gc")]
    Gc,
    /// Repair the chunk store of a stopped daemon.
    #[command(
        subcommand,
        after_help = "Example:\n  packhorse store rebuild-index --config /etc/packhorse/hub.toml"
    )]
    Store(StoreCommand),
    /// Check disks, database, registry, NAS and connection.
    #[command(after_help = "Example:\n  packhorse doctor")]
    Doctor,
    /// Check the configuration.
    #[command(
        subcommand,
        after_help = "Example:\n  packhorse config check --config /etc/packhorse/site.toml"
    )]
    Config(ConfigCommand),
    /// Print a script with which the shell completes commands and options.
    #[command(after_help = "Examples:
  packhorse completions bash > /etc/bash_completion.d/packhorse
  packhorse completions zsh > /usr/local/share/zsh/site-functions/_packhorse
  packhorse completions fish > /etc/fish/completions/packhorse.fish")]
    Completions {
        /// The shell.
        shell: Shell,
    },
    /// Write the man pages of the program and of each command into a directory.
    #[command(after_help = "Example:\n  packhorse man /usr/local/share/man/man1")]
    Man {
        /// The directory; created if it does not exist.
        #[arg(value_name = "DIR")]
        dir: PathBuf,
    },
}

impl Command {
    /// Whether this runs a daemon, whose log is more detailed.
    pub(super) fn is_daemon(&self) -> bool {
        matches!(self, Command::Serve { .. })
    }
}

#[derive(Debug, Subcommand)]
pub(super) enum TokenCommand {
    /// Create a join token for one site or one publisher; it works once.
    #[command(after_help = "Examples:
  packhorse token create --site chengdu --label region=west --label line=1
  packhorse token create --publisher office --artifacts dataset/line3-* --deliver-to none --ttl 1h")]
    Create(TokenCreate),
}

#[derive(Debug, clap::Args)]
pub(super) struct TokenCreate {
    /// The site that can join with the token.
    #[arg(long, value_name = "NAME", required_unless_present = "publisher")]
    pub(super) site: Option<String>,
    /// The publisher that can join with the token: it can publish from another machine (`publish
    /// --hub`) and do nothing else.
    #[arg(long, value_name = "NAME", conflicts_with_all = ["site", "labels"])]
    pub(super) publisher: Option<String>,
    /// A label of the site; can be repeated.
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = key_value)]
    pub(super) labels: Vec<(String, String)>,
    /// What the publisher can publish, separated by commas: KIND/NAME with * for any characters, such
    /// as dataset/line3-*,model/*. A publisher that joined before keeps its limit without this option;
    /// */* lifts it [default: anything].
    #[arg(
        long,
        value_name = "PATTERN",
        value_delimiter = ',',
        requires = "publisher"
    )]
    pub(super) artifacts: Vec<String>,
    /// Where the publisher can deliver what it publishes: names separated by commas, `all`, a label
    /// selector, or `none`. A publisher that joined before keeps its limit without this option
    /// [default: all].
    #[arg(long, value_name = "SITES", requires = "publisher")]
    pub(super) deliver_to: Option<String>,
    /// How long the token is valid, at most 30d.
    #[arg(long, default_value = "24h", value_name = "DURATION", value_parser = config::parse_duration)]
    pub(super) ttl: Duration,
}

#[derive(Debug, Subcommand)]
pub(super) enum StoreCommand {
    /// Make a damaged or missing chunk index again from the packs; the daemon must be stopped.
    #[command(
        after_help = "Example:\n  packhorse store rebuild-index --config /etc/packhorse/hub.toml"
    )]
    RebuildIndex,
}

#[derive(Debug, Subcommand)]
pub(super) enum ConfigCommand {
    /// Check a configuration without contacting another machine.
    #[command(after_help = "Example:\n  packhorse config check --config /etc/packhorse/site.toml")]
    Check,
}

#[derive(Debug, clap::Args)]
pub(super) struct Publish {
    /// A path, registry://HOST/REPOSITORY:TAG (also docker://, https://, http://), or at a site its label database:
    /// db:LABEL_SET:VERSION, db:'SELECT ...'.
    #[arg(
        required_unless_present = "list",
        default_value = "",
        hide_default_value = true
    )]
    pub(super) source: OsString,
    /// The reference to publish it as; kinds are dataset, labels, operator, image, model.
    #[arg(
        long = "as",
        value_name = "KIND/NAME:VERSION",
        required_unless_present_any = ["list", "all"],
        default_value = "",
        hide_default_value = true
    )]
    pub(super) as_ref: String,
    /// Publish all images of this list, each under the name and the tag of its repository: references
    /// line by line, the YAML of skopeo sync, or Images documents of Hauler.
    #[arg(
        long,
        value_name = "FILE",
        conflicts_with_all = ["source", "as_ref", "hub", "repository", "tag", "compress", "for_dataset", "run"]
    )]
    pub(super) list: Option<PathBuf>,
    /// Publish all images of an archive or OCI layout, each under its own name and tag.
    #[arg(
        long,
        conflicts_with_all = ["as_ref", "list", "hub", "repository", "tag", "for_dataset", "run"]
    )]
    pub(super) all: bool,
    /// Deliver at once to these sites: names separated by commas, `all`, or a label selector
    /// (`region=west,line!=3`).
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
    /// Labels: coco, csv, cvat, datumaro, jsonl, klarf, label_studio, labelme, masks, via, voc or
    /// yolo; detected if absent.
    #[arg(long)]
    pub(super) format: Option<String>,
    /// Labels from Pascal VOC: 0 or 1, the number of the first pixel; 0 (0-exclusive) reads xmax as
    /// the first column behind the box, 1 (1-inclusive) as its last column; also 0-inclusive and
    /// 1-exclusive. Inferred and reported if absent.
    #[arg(long, value_name = "BASE")]
    pub(super) voc_base: Option<String>,
    /// Labels: refuse an input with bad records (exit code 8); skip them and report how many of
    /// each kind; or clip shapes at the edges of their image and skip all other bad records
    /// [default: refuse].
    #[arg(long, value_name = "ACTION", value_parser = ["refuse", "skip", "clip"])]
    pub(super) on_bad: Option<String>,
    /// Labels: write all bad records to this new file, as JSON Lines. With a daemon, the daemon
    /// writes it.
    #[arg(long, value_name = "FILE")]
    pub(super) bad_out: Option<PathBuf>,
    /// Labels: the encoding of the text, such as gbk or utf-16le. Inferred and reported if absent.
    #[arg(long, value_name = "ENCODING")]
    pub(super) encoding: Option<String>,
    /// Labels from KLARF: how many micrometres a pixel is wide; defects become boxes in pixels.
    /// Without it, rows have no boxes.
    #[arg(long, value_name = "MICROMETRES")]
    pub(super) klarf_scale: Option<String>,
    /// Labels: which column of a CSV or JSON Lines file holds what (sample_path=image); also
    /// settings such as path_strip, path_prefix and normalised; can be repeated.
    #[arg(long = "column", value_name = "FIELD=COLUMN", value_parser = key_value, num_args = 1..)]
    pub(super) columns: Vec<(String, String)>,
    /// Files: leave out the entries that match this pattern, in the syntax of gitignore; can be
    /// repeated. Patterns are also read from files .packhorseignore. Left out by default: @eaDir,
    /// .DS_Store, Thumbs.db, .nfs* ('!.DS_Store' includes it).
    #[arg(long, value_name = "PATTERN")]
    pub(super) exclude: Vec<String>,
    /// Files: publish what links lead to, in the place of the links; also outside the directory.
    #[arg(long)]
    pub(super) copy_links: bool,
    /// Files: wait until each file has not been written to for this time, such as 10s.
    #[arg(long, value_name = "DURATION", value_parser = config::parse_duration)]
    pub(super) settle: Option<Duration>,
    /// Files: the encoding of names that are not UTF-8, such as gbk.
    #[arg(long, value_name = "ENCODING")]
    pub(super) name_encoding: Option<String>,
    /// Files: leave the modification times out; files then have the time of their arrival. A site of
    /// an earlier version can receive only such an artifact.
    #[arg(long)]
    pub(super) no_times: bool,
    /// Files: publish the extended attributes of users (user.*).
    #[arg(long)]
    pub(super) xattrs: bool,
    /// Files: publish several names of one file as one file, not as copies.
    #[arg(long)]
    pub(super) hard_links: bool,
    /// Images: the repository at the sites, such as ops/team/trainer [default: the artifact's name].
    #[arg(long)]
    pub(super) repository: Option<String>,
    /// Images: the tag at the sites, such as V1.2_A [default: the artifact's version].
    #[arg(long)]
    pub(super) tag: Option<String>,
    /// Images: keep only these platforms, such as linux/amd64; separated by commas. All if absent.
    #[arg(long = "platform", value_name = "PLATFORM", value_delimiter = ',')]
    pub(super) platforms: Vec<String>,
    /// Images from docker save: compress the layers with gzip. Their digests become others than in
    /// the registry that the image came from.
    #[arg(long)]
    pub(super) compress: bool,
    /// Images: leave out the signatures, attestations and SBOMs that refer to the image. A site of
    /// an earlier version can receive only such an artifact.
    #[arg(long)]
    pub(super) no_referrers: bool,
    /// Refuse an input from which something would be left out (exit code 8). Without it, `publish`
    /// reports what it leaves out.
    #[arg(long)]
    pub(super) strict: bool,
    /// With --strict: categories that may be left out, separated by commas; a refusal of --strict
    /// names them.
    #[arg(long, value_name = "CATEGORY", value_delimiter = ',')]
    pub(super) accept_omitted: Vec<Category>,
    /// The training run that made this model; the model is delivered to the site that started the
    /// run.
    #[arg(long, value_name = "RUN", conflicts_with = "hub")]
    pub(super) run: Option<String>,
    /// With --hub and a registry: the user; without it, that of 'docker login'. A daemon takes user
    /// and password from its configuration: [registry."HOST"].
    #[arg(long, requires = "password_file")]
    pub(super) username: Option<String>,
    /// With --hub and a registry: a file with the password.
    #[arg(long, value_name = "FILE", requires = "username")]
    pub(super) password_file: Option<PathBuf>,
    /// With --hub and a registry: a file with PEM certificates to trust, of authorities or the
    /// registry's own.
    #[arg(long, value_name = "FILE", requires = "hub")]
    pub(super) ca_file: Option<PathBuf>,
    /// With --hub and a registry: another host that may receive the password, the registry's token
    /// service; can be repeated.
    #[arg(long = "realm-host", value_name = "HOST", requires = "hub")]
    pub(super) realm_hosts: Vec<String>,
    /// With --hub and a registry: accept any certificate, and a registry without TLS.
    #[arg(long, requires = "hub")]
    pub(super) insecure: bool,
    /// Publish from this machine, without a daemon, at the hub with this address; only chunks that
    /// the hub lacks are sent.
    #[arg(long, value_name = "HOST:PORT", value_parser = config::parse_host_port)]
    pub(super) hub: Option<String>,
    /// With --hub, the first time: the output of `token create --publisher`; later it is not used.
    /// The environment variable keeps it out of the process list.
    #[arg(
        long,
        env = "PACKHORSE_JOIN_TOKEN",
        hide_env_values = true,
        value_name = "TOKEN"
    )]
    pub(super) join_token: Option<String>,
    /// With --hub: the directory of this machine's certificate [default: ~/.local/share/packhorse].
    #[arg(long, value_name = "DIR", requires = "hub")]
    pub(super) state: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
pub(super) struct Deliver {
    /// KIND/NAME:VERSION; one or more.
    #[arg(value_name = "REF", required = true)]
    pub(super) artifacts: Vec<String>,
    /// The sites: names separated by commas, `all`, or a label selector (`region=west,line!=3`).
    #[arg(long, value_name = "SITES")]
    pub(super) to: String,
    #[command(flatten)]
    pub(super) wait: Wait,
}

#[derive(Debug, clap::Args)]
pub(super) struct Wait {
    /// Wait until the transfers, or the training run, end.
    #[arg(long)]
    pub(super) wait: bool,
    /// Stop waiting after this time (exit code 11); the work continues.
    #[arg(long, value_name = "DURATION", value_parser = config::parse_duration)]
    pub(super) timeout: Option<Duration>,
}

#[derive(Debug, clap::Args)]
pub(super) struct Status {
    /// Id of a transfer or of a delivery; several ids are separated by commas.
    pub(super) transfer: Option<String>,
    /// Show changes as they happen; for a named transfer or delivery until it ends.
    #[arg(long)]
    pub(super) watch: bool,
    /// Show only what changed after this cursor (0: everything); the next cursor is printed on
    /// stderr.
    #[arg(long, value_name = "CURSOR")]
    pub(super) since: Option<u64>,
    /// Show at most this many transfers.
    #[arg(long, default_value_t = base::limits::API_ROWS_DEFAULT, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..))]
    pub(super) limit: u32,
}

pub(super) fn key_value(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.into(), value.into())),
        _ => Err("write it as KEY=VALUE".into()),
    }
}
