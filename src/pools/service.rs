//! Finds the files that haproxy.service makes HAProxy read, from its unit, drop-ins and environment files. Knows
//! systemd's syntax as far as Debian's and RHEL's packages use it. Does not ask systemd, which may be busy with a
//! reload.

use crate::file;
use crate::pools::words::Environment;
use std::fs;
use std::path::{Path, PathBuf};

/// The maximum size of a unit or environment file.
const LIMIT: u64 = 1 << 20;
/// The folders of units; the first one that has the unit wins.
const UNITS: [&str; 4] =
    ["etc/systemd/system", "run/systemd/system", "usr/lib/systemd/system", "lib/systemd/system"];
/// HAProxy's configuration if there is no unit.
const ALONE: &str = "/etc/haproxy/haproxy.cfg";

/// The files and variables with which the service starts HAProxy.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Service {
    /// The values of `-f`, in order.
    pub files: Vec<PathBuf>,
    /// The variables of the service.
    pub environment: Environment,
}

/// Reads the unit below `root`, which is `/` except in tests.
pub fn read_service(root: &Path) -> Service {
    let mut text = String::new();
    for folder in UNITS {
        text = read(&root.join(folder).join("haproxy.service"));
        if !text.is_empty() {
            break;
        }
    }
    for drop_in in drop_ins(root) {
        text += "\n";
        text += &read(&drop_in);
    }
    // systemd joins a line that ends with a backslash to the next one.
    let text = text.replace("\\\n", " ");
    let (mut start, mut environment, mut files) = ("", Environment::new(), Vec::new());
    for (key, value) in text.lines().filter_map(|line| line.trim().split_once('=')) {
        let value = value.trim();
        match key.trim() {
            "ExecStart" => start = value,
            "Environment" => environment.extend(assignments(value)),
            "EnvironmentFile" if value.is_empty() => files.clear(),
            "EnvironmentFile" => files.push(value.trim_start_matches('-')),
            _ => {}
        }
    }
    for file in files {
        let text = read(&root.join(file.trim_start_matches('/')));
        for line in text.lines().map(str::trim).filter(|line| !line.starts_with(['#', ';'])) {
            if let Some((name, value)) = line.split_once('=') {
                environment.insert(name.trim().to_owned(), words(value).join(" "));
            }
        }
    }
    let mut files = started_with(start, &environment);
    if files.is_empty() {
        files.push(ALONE.into());
    }
    Service { files, environment }
}

/// The values of `-f` in a command line whose words may be variables.
fn started_with(start: &str, environment: &Environment) -> Vec<PathBuf> {
    let mut arguments: Vec<String> = Vec::new();
    for word in words(start) {
        let name = word.strip_prefix("${").and_then(|word| word.strip_suffix('}'));
        match (name, word.strip_prefix('$')) {
            // `${X}` is one word; systemd splits `$X` into words.
            (Some(name), _) => arguments.extend(environment.get(name).cloned()),
            (None, Some(name)) => {
                arguments
                    .extend(environment.get(name).map(|value| words(value)).unwrap_or_default());
            }
            _ => arguments.push(word),
        }
    }
    let mut files = Vec::new();
    let mut arguments = arguments.into_iter();
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "-f" => files.extend(arguments.next().map(PathBuf::from)),
            "--" => files.extend(arguments.by_ref().map(PathBuf::from)),
            _ => {}
        }
    }
    files
}

/// All drop-ins, ordered by name. A drop-in in `/etc` hides others of the same name.
fn drop_ins(root: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = Vec::new();
    for folder in UNITS {
        let Ok(entries) = fs::read_dir(root.join(folder).join("haproxy.service.d")) else {
            continue;
        };
        for path in entries.flatten().map(|entry| entry.path()) {
            let conf = path.extension().is_some_and(|extension| extension == "conf");
            if conf && found.iter().all(|other| other.file_name() != path.file_name()) {
                found.push(path);
            }
        }
    }
    found.sort_by(|one, other| one.file_name().cmp(&other.file_name()));
    found
}

fn read(path: &Path) -> String {
    file::read(path, LIMIT)
        .map(|text| String::from_utf8_lossy(&text).into_owned())
        .unwrap_or_default()
}

fn assignments(text: &str) -> Vec<(String, String)> {
    let pairs = words(text).into_iter();
    pairs
        .filter_map(|word| word.split_once('=').map(|(n, v)| (n.to_owned(), v.to_owned())))
        .collect()
}

/// Splits a text into words that may be quoted, in whole or in part.
fn words(text: &str) -> Vec<String> {
    // For paths, systemd's quotes and backslashes work as HAProxy's do. HAProxy expands no `$` in single quotes.
    crate::pools::words::split(&text.replace('#', "\\#"), &Environment::new()).words
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(root: &Path, file: &str, text: &str) {
        let file = root.join(file);
        fs::create_dir_all(file.parent().expect("a folder")).expect("a folder");
        fs::write(file, text).expect("a file");
    }

    #[test]
    fn debian_and_rhel() {
        let folder = tempfile::tempdir().expect("a folder");
        let root = folder.path();
        assert_eq!(read_service(root).files, [Path::new(ALONE)]);
        put(
            root,
            "lib/systemd/system/haproxy.service",
            "[Service]\nEnvironmentFile=-/etc/default/haproxy\nEnvironment=\"CONFIG=/etc/haproxy/haproxy.cfg\" \
             \"PIDFILE=/run/haproxy.pid\" \"EXTRAOPTS=-S /run/haproxy-master.sock\"\n\
             ExecStart=/usr/sbin/haproxy -Ws -f $CONFIG -p $PIDFILE $EXTRAOPTS\n",
        );
        assert_eq!(read_service(root).files, [Path::new(ALONE)]);
        put(
            root,
            "etc/default/haproxy",
            "# x\n#CONFIG=\"/a\"\nEXTRAOPTS=\"-f /etc/haproxy/pools\"\nPG1=10.0.0.1\n",
        );
        let debian = read_service(root);
        assert_eq!(debian.files, [ALONE, "/etc/haproxy/pools"].map(PathBuf::from));
        assert_eq!(debian.environment["PG1"], "10.0.0.1");
        put(
            root,
            "etc/systemd/system/haproxy.service",
            "[Service]\nEnvironment=\"CONFIG=/etc/haproxy/haproxy.cfg\" \"CFGDIR=/etc/haproxy/conf.d\"\n\
             EnvironmentFile=/etc/sysconfig/haproxy\n\
             ExecStart=/usr/sbin/haproxy -Ws -f $CONFIG -f $CFGDIR -p $PIDFILE $OPTIONS\n",
        );
        assert_eq!(read_service(root).files, [ALONE, "/etc/haproxy/conf.d"].map(PathBuf::from));
        put(root, "etc/sysconfig/haproxy", "OPTIONS=-f '/etc/haproxy/more.cfg'\n");
        put(
            root,
            "etc/systemd/system/haproxy.service.d/x.conf",
            "[Service]\nEnvironment=CFGDIR=/etc/other\n",
        );
        assert_eq!(
            read_service(root).files,
            [ALONE, "/etc/other", "/etc/haproxy/more.cfg"].map(PathBuf::from)
        );
    }
}
