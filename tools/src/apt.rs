//! Debian packages: installing the few that must be installed, fetching the others.
//!
//! Only [`install`] and a refresh of the machine's package lists need root (or `sudo`). Nothing here
//! changes the machine's apt sources: what they don't offer is looked up with an apt configuration
//! of its own, in the cache.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::cache;
use crate::error::{Doing, Error, Result};
use crate::process;

/// How often something on the network is tried; apt itself retries each file as well.
const ATTEMPTS: usize = 3;

/// The release of Debian that all this is made for.
const CODENAME: &str = "bookworm";

/// Debian's own keys, as its package `debian-archive-keyring` installs them.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Which package lists are asked.
pub enum Lists {
    /// The machine's own.
    Machine,
    /// Those of one more suite, kept in the cache: the arguments that make apt use them.
    Own(Vec<String>),
}

/// One version of a package on offer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Offer {
    /// The package's version.
    pub version: String,
    /// The suite and component, as in `bookworm/main`.
    pub suite: String,
}

/// Installs packages, with `sudo` where this isn't root.
pub fn install(packages: &[&str]) -> Result<()> {
    let names = packages.join(" ");
    eprintln!("xtask: installing {names}");
    ensure_lists()?;
    with_retries(&names, || {
        let mut command = as_root("apt-get");
        command
            .args(["install", "--yes", "--no-install-recommends", "-o", "DPkg::Lock::Timeout=300"])
            .args(["-o", "Acquire::Retries=3", "-o", "Dpkg::Use-Pty=0"])
            .args(packages)
            .env("DEBIAN_FRONTEND", "noninteractive");
        process::output(&mut command)
    })?;
    Ok(())
}

/// Fetches one version of a package and unpacks it, without installing it, into `dir`.
pub fn unpack(lists: &Lists, package: &str, version: Option<&str>, dir: &Path) -> Result<()> {
    let wanted = match version {
        Some(version) => format!("{package}={version}"),
        None => package.to_owned(),
    };
    eprintln!("xtask: fetching {wanted}");
    if matches!(lists, Lists::Machine) {
        ensure_lists()?;
    }
    let download =
        tempfile::tempdir_in(dir).doing(|| format!("create a directory in {}", dir.display()))?;
    with_retries(&wanted, || {
        let mut command = apt("apt-get", lists);
        command
            .args([
                "-o",
                "Acquire::Retries=3",
                "-o",
                "APT::Sandbox::User=root",
                "download",
                &wanted,
            ])
            .current_dir(download.path());
        process::output(&mut command)
    })?;
    let deb = only_file_in(download.path())?;
    process::output(Command::new("dpkg").arg("-x").arg(&deb).arg(dir))?;
    Ok(())
}

/// The versions of a package on offer, the one apt prefers first.
pub fn offers(lists: &Lists, package: &str) -> Result<Vec<Offer>> {
    if matches!(lists, Lists::Machine) {
        ensure_lists()?;
    }
    let table = process::output(apt("apt-cache", lists).args(["madison", package]))?;
    Ok(parse_madison(&table))
}

/// The package that a meta package of a given version stands for: its first dependency that
/// starts with `prefix`.
pub fn dependency(lists: &Lists, package: &str, version: &str, prefix: &str) -> Result<String> {
    let wanted = format!("{package}={version}");
    let shown = process::output(apt("apt-cache", lists).args(["show", &wanted]))?;
    let depends = shown.lines().find_map(|line| line.strip_prefix("Depends: ")).unwrap_or("");
    depends
        .split(',')
        .filter_map(|clause| clause.split_whitespace().next())
        .find(|name| name.starts_with(prefix))
        .map(str::to_owned)
        .ok_or_else(|| Error::NotOffered {
            wanted: format!("dependency {prefix}… of {wanted}"),
            found: format!("it depends on `{depends}`"),
        })
}

/// Makes the suite `bookworm-backports`, of the mirror that the machine already uses, known to an
/// apt configuration of its own.
pub fn backports() -> Result<Lists> {
    let suite = format!("{CODENAME}-backports");
    let dir = cache::root()?.join("apt").join(&suite);
    for sub in ["sources.list.d", "lists/partial", "archives/partial"] {
        cache::create_dir(&dir.join(sub))?;
    }
    let signed_by =
        if Path::new(KEYRING).exists() { format!("[signed-by={KEYRING}] ") } else { String::new() };
    let line = format!("deb {signed_by}{} {suite} main\n", mirror()?);
    let list = dir.join("sources.list.d/backports.list");
    fs::write(&list, line).doing(|| format!("write {}", list.display()))?;

    let option =
        |name: &str, path: PathBuf| ["-o".to_owned(), format!("{name}={}", path.display())];
    let mut options: Vec<String> = [
        option("Dir::Etc::sourcelist", PathBuf::from("/dev/null")),
        option("Dir::Etc::sourceparts", dir.join("sources.list.d")),
        option("Dir::State::lists", dir.join("lists")),
        option("Dir::Cache", dir.clone()),
        option("Dir::Cache::archives", dir.join("archives")),
    ]
    .concat();
    options.extend(["-o".to_owned(), "APT::Sandbox::User=root".to_owned()]);
    let lists = Lists::Own(options);
    eprintln!("xtask: reading the package list of {suite}");
    with_retries(&suite, || {
        process::output(apt("apt-get", &lists).args(["-o", "Acquire::Retries=3", "update"]))
    })?;
    Ok(lists)
}

/// The address of the mirror that the machine's apt gets this release from.
fn mirror() -> Result<String> {
    let format = "$(REPO_URI) $(CODENAME) $(COMPONENT)";
    let targets = process::output(apt("apt-get", &Lists::Machine).args([
        "indextargets",
        "--format",
        format,
        "Created-By: Packages",
    ]))?;
    parse_mirror(&targets).ok_or_else(|| Error::NotOffered {
        wanted: format!("source for {CODENAME} main"),
        found: format!("the configured ones are\n{targets}"),
    })
}

fn parse_mirror(targets: &str) -> Option<String> {
    targets.lines().find_map(|line| {
        let [address, codename, component] =
            line.split_whitespace().collect::<Vec<_>>().try_into().ok()?;
        (codename == CODENAME && component == "main").then(|| address.to_owned())
    })
}

fn parse_madison(table: &str) -> Vec<Offer> {
    let mut offers: Vec<Offer> = Vec::new();
    for line in table.lines() {
        let columns: Vec<&str> = line.split('|').map(str::trim).collect();
        let [_, version, source] = columns[..] else { continue };
        // The third column is "ADDRESS SUITE/COMPONENT ARCHITECTURE Packages".
        let Some(suite) = source.split_whitespace().nth(1) else { continue };
        if !offers.iter().any(|offer| offer.version == version) {
            offers.push(Offer { version: version.to_owned(), suite: suite.to_owned() });
        }
    }
    offers
}

/// Reads the machine's package lists when it has none (as in a fresh container image).
fn ensure_lists() -> Result<()> {
    let dir = Path::new("/var/lib/apt/lists");
    let has_any = fs::read_dir(dir)
        .doing(|| format!("read {}", dir.display()))?
        .flatten()
        .any(|file| file.file_name().to_string_lossy().contains("_Packages"));
    if has_any { Ok(()) } else { update() }
}

fn update() -> Result<()> {
    eprintln!("xtask: running apt-get update");
    process::output(as_root("apt-get").args(["-o", "Acquire::Retries=3", "update"]))?;
    Ok(())
}

/// Tries something on the network; between tries the package lists are read anew, for the usual
/// reason of a failure is that they are older than the mirror.
fn with_retries(what: &str, mut attempt: impl FnMut() -> Result<String>) -> Result<String> {
    let mut last = String::new();
    for round in 1..=ATTEMPTS {
        match attempt() {
            Ok(output) => return Ok(output),
            Err(Error::Failed { output, .. }) => last = output,
            Err(other) => return Err(other),
        }
        if round < ATTEMPTS {
            eprintln!("xtask: that failed ({what}); trying again with fresh package lists");
            if let Err(error) = update() {
                eprintln!("xtask: {error}");
            }
        }
    }
    Err(Error::Package { packages: what.to_owned(), attempts: ATTEMPTS, output: last })
}

fn apt(program: &str, lists: &Lists) -> Command {
    let mut command = Command::new(program);
    command.env("LC_ALL", "C");
    if let Lists::Own(options) = lists {
        command.args(options);
    }
    command
}

fn as_root(program: &str) -> Command {
    let mut command = if nix::unistd::geteuid().is_root() {
        Command::new(program)
    } else {
        let mut command = Command::new("sudo");
        command.args(["--preserve-env=DEBIAN_FRONTEND,LC_ALL", program]);
        command
    };
    command.env("LC_ALL", "C");
    command
}

fn only_file_in(dir: &Path) -> Result<PathBuf> {
    let files: Vec<PathBuf> = fs::read_dir(dir)
        .doing(|| format!("read {}", dir.display()))?
        .flatten()
        .map(|file| file.path())
        .collect();
    match &files[..] {
        [file] => Ok(file.clone()),
        _ => Err(Error::NotOffered {
            wanted: "package file".to_owned(),
            found: format!("apt left {} files", files.len()),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn madison_lists_each_version_once_in_order() {
        let table = " linux-image-amd64 |  6.1.192-2 | http://m/sec bookworm-security/main amd64 Packages\n \
                     linux-image-amd64 |  6.1.176-1 | http://m/deb bookworm/main amd64 Packages\n \
                     linux-image-amd64 |  6.1.176-1 | http://m/deb bookworm/main amd64 Packages\n";
        let versions: Vec<_> =
            parse_madison(table).into_iter().map(|offer| offer.version).collect();
        assert_eq!(versions, ["6.1.192-2", "6.1.176-1"]);
        assert_eq!(parse_madison("N: Unable to locate package\n"), []);
    }

    #[test]
    fn the_mirror_is_that_of_the_plain_suite() {
        let targets = "http://m/s/ bookworm-security main\nhttp://m/d/ bookworm contrib\nhttp://m/d/ bookworm main\n";
        assert_eq!(parse_mirror(targets).as_deref(), Some("http://m/d/"));
        assert_eq!(parse_mirror("http://m/d/ trixie main\n"), None);
    }
}
