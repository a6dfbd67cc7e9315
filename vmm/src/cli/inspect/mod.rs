//! `mini-vmm inspect`: what a migration stream contains.

mod image;
mod show;

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use migration::inspect::{self, Report, Visitor};
use serde_json::{Value, json};

use super::CliError;
use image::{ImageFile, Images};

/// How a socket is told from a file.
const SOCKET: &str = "unix:";

#[derive(Debug, Args)]
pub(super) struct InspectArgs {
    /// A file, `-` for standard input, or unix:PATH to listen there for a source
    stream: String,
    /// The stream to compare it with
    #[arg(requires = "diff")]
    other: Option<String>,
    /// Show the fields of the sections whose name contains this (repeatable)
    #[arg(long, value_name = "NAME", conflicts_with = "diff")]
    section: Vec<String>,
    /// As JSON
    #[arg(long)]
    json: bool,
    /// Tell in which sections, fields and pages two streams differ; exit status 1 if they do
    #[arg(long, requires = "other")]
    diff: bool,
    /// Write the memory image to a new file
    #[arg(long, value_name = "FILE", conflicts_with = "diff")]
    ram: Option<PathBuf>,
    /// The RAM block that --ram writes
    #[arg(long, value_name = "NAME", default_value = "pc.ram", requires = "ram")]
    block: String,
}

pub(super) fn inspect(args: &InspectArgs) -> Result<(), CliError> {
    if let Some(other) = args.other.as_ref().filter(|_| args.diff) {
        return compare(&args.stream, other, args.json);
    }
    let report = match &args.ram {
        None => read(&args.stream, &mut ())?,
        Some(file) => {
            let mut image = ImageFile::new(file, &args.block)
                .map_err(CliError::io(format!("cannot make {}", file.display())))?;
            let report = read(&args.stream, &mut image)?;
            image.check(file).map_err(CliError::Inspect)?;
            report
        }
    };
    let chosen: Vec<_> = report
        .devices()
        .filter(|section| args.section.iter().any(|name| section.key.to_string().contains(name)))
        .collect();
    if !args.section.is_empty() && chosen.is_empty() && report.broken.is_none() {
        let known: Vec<_> = report.devices().map(|section| section.key.to_string()).collect();
        return Err(CliError::Inspect(format!(
            "no section has a name with {}; there are: {}",
            args.section.join(" or "),
            known.join(", ")
        )));
    }
    if args.json {
        let all = || chosen.iter().map(|section| section.to_json()).collect::<Value>();
        show::print(&if args.section.is_empty() { report.to_json() } else { all() });
    } else if args.section.is_empty() {
        show::report(&report);
    } else {
        chosen.iter().for_each(|section| show::section(section));
    }
    match &report.broken {
        Some(broken) => Err(CliError::Inspect(show::broken(broken))),
        None => Ok(()),
    }
}

fn compare(first: &str, second: &str, as_json: bool) -> Result<(), CliError> {
    let one = |name: &str| -> Result<(Report, Images), CliError> {
        let mut images = Images::default();
        let report = read(name, &mut images)?;
        match &report.broken {
            Some(broken) => Err(CliError::Inspect(format!("{name}: {}", show::broken(broken)))),
            None => Ok((report, images)),
        }
    };
    let (a, b) = (one(first)?, one(second)?);
    let fields = inspect::diff(&a.0, &b.0);
    let pages = a.1.differences(&b.1).map_err(CliError::io("cannot compare the pages"))?;
    if as_json {
        let fields = fields.iter().map(|difference| {
            json!({
                "place": difference.place, "first": difference.first, "second": difference.second,
            })
        });
        let pages = pages
            .iter()
            .map(|block| json!({ "block": block.name, "pages": block.pages, "at": block.first }));
        show::print(&json!({
            "fields": fields.collect::<Value>(), "pages": pages.collect::<Value>(),
        }));
    } else {
        show::differences(&fields, &pages);
    }
    if fields.is_empty() && pages.is_empty() {
        return Ok(());
    }
    Err(CliError::Inspect("the streams differ".into()))
}

/// Reads a stream from wherever it is.
fn read(name: &str, visitor: &mut dyn Visitor) -> Result<Report, CliError> {
    let failed = |what: &str| CliError::io(format!("{what} {name}"));
    let (from, len): (Box<dyn Read>, Option<u64>) = if name == "-" {
        (Box::new(io::stdin().lock()), None)
    } else if let Some(path) = name.strip_prefix(SOCKET) {
        (Box::new(accept(Path::new(path)).map_err(failed("cannot listen at"))?), None)
    } else {
        let file = File::open(name).map_err(failed("cannot open"))?;
        let meta = file.metadata().map_err(failed("cannot open"))?;
        let len = meta.is_file().then_some(meta.len());
        (Box::new(file), len)
    };
    let bar = progress_bar(len);
    let report = inspect::read(from, visitor, &mut |bytes| bar.set_position(bytes));
    bar.finish_and_clear();
    let mut report = report.map_err(failed("cannot write what was read from"))?;
    devices::virtio::take_apart(&mut report);
    Ok(report)
}

/// The first source that connects to a new socket.
fn accept(path: &Path) -> io::Result<impl Read + use<>> {
    let listener = UnixListener::bind(path)?;
    let connected = listener.accept();
    // Nobody else shall wait for an answer there.
    let _ = std::fs::remove_file(path);
    connected.map(|(stream, _)| stream)
}

fn progress_bar(len: Option<u64>) -> ProgressBar {
    let (bar, template) = match len {
        Some(len) => (ProgressBar::new(len), "{bar:24} {percent:>3}%  {bytes}, {bytes_per_sec}"),
        None => (ProgressBar::new_spinner(), "{spinner} {bytes}, {bytes_per_sec}"),
    };
    let style = ProgressStyle::with_template(template);
    bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}
