//! The build script. Out come the version, which names the commit unless it is a release, and the filters of the sandbox.

#[path = "sandbox/build.rs"]
mod sandbox;

use std::error::Error;
use std::process::Command;

const RELEASE: &str = env!("CARGO_PKG_VERSION");
/// The version says whether any of these was changed after the commit.
const SHIPPED: [&str; 5] = ["src", "units", "Cargo.toml", "Cargo.lock", ".cargo"];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rustc-env=VERSION={}", version());
    sandbox::write_filters()
}

/// Cargo.toml's version. In a checkout, unless the commit is tagged with that version, the commit's time in UTC and its
/// hash follow: `0.2.0~git20261130.1704.44c5417` before the tag, and `0.2.0+git...` after it. dpkg and rpm take `~` for
/// older than the release, and `+` for newer.
fn version() -> String {
    // these sources may lie inside another repository, whose commit is not theirs
    if git(&["rev-parse", "--show-prefix"]).as_deref() != Some("") {
        println!("cargo::rerun-if-changed=Cargo.toml");
        return RELEASE.to_owned();
    }
    let head = git(&["rev-parse", "--git-path", "logs/HEAD"]).unwrap_or_default();
    for path in SHIPPED.iter().chain([&head.as_str()]) {
        println!("cargo::rerun-if-changed={path}");
    }
    let status = ["status", "--porcelain", "--untracked-files=no", "--"];
    let unchanged = git(&[&status, &SHIPPED[..]].concat()).as_deref() == Some("");
    let tag = git(&["tag", "--points-at", "HEAD", "--list", &format!("v{RELEASE}")]);
    if unchanged && tag.is_some_and(|tag| !tag.is_empty()) {
        return RELEASE.to_owned();
    }
    let format = ["--format=git%cd.%h", "--date=format-local:%Y%m%d.%H%M", "--abbrev=7"];
    let commit = git(&[&["log", "-1"], &format[..]].concat()).unwrap_or("unknown".to_owned());
    let released = git(&["merge-base", "--is-ancestor", &format!("v{RELEASE}"), "HEAD"]).is_some();
    let sign = if released { '+' } else { '~' };
    format!("{RELEASE}{sign}{commit}{}", if unchanged { "" } else { ".changed" })
}

/// What git says about this checkout; `None` without git or a checkout.
fn git(arguments: &[&str]) -> Option<String> {
    let output = Command::new("git").args(arguments).env("TZ", "UTC").output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
