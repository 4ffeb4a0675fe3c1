//! What a check by hand tells of this machine: whether HAProxy can ask, and what holds for HAProxy's checks alone. In go
//! drop-ins and the kernel's lists of sockets, out come lines. Knows nothing of the command line.

use crate::NAME;
use crate::file;
use crate::patroni::ports;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// The longest drop-in in bytes.
const SIZE_LIMIT: u64 = 64 * 1024;
/// The port of the units.
const PORT: &str = "5555";
/// The folder of an administrator's drop-ins.
const FOLDER: &str = "etc/systemd/system";
/// For the socket of each pair, the folders of its drop-ins. A file in the last one replaces its namesake.
const SOCKETS: [[&str; 2]; 2] = [
    ["patroni-agent-.socket.d", "patroni-agent-check.socket.d"],
    ["patroni-agent-.socket.d", "patroni-agent-check-listen.socket.d"],
];
const SERVICES: [&str; 2] =
    ["patroni-agent-check@.service.d", "patroni-agent-check-listen.service.d"];

/// Finds the drop-ins in these folders, in systemd's order, which is that of their names.
fn find_drop_ins(root: &Path, folders: &[&str]) -> Vec<PathBuf> {
    let folders = folders.iter().map(|folder| root.join(FOLDER).join(folder));
    let files = folders.filter_map(|folder| fs::read_dir(folder).ok()).flatten().flatten();
    let files = files.map(|file| (file.file_name(), file.path()));
    let files = files.filter(|(_, path)| path.extension().is_some_and(|end| end == "conf"));
    files.collect::<BTreeMap<_, _>>().into_values().collect()
}

/// Reads the values of a socket's setting, each with its file. An empty value clears those before it.
fn read_values(root: &Path, folders: &[&str], key: &str, default: &str) -> Vec<(PathBuf, String)> {
    let mut values = vec![(PathBuf::new(), default.to_owned())];
    for path in find_drop_ins(root, folders) {
        let text = file::read(&path, SIZE_LIMIT).unwrap_or_default();
        let text = String::from_utf8_lossy(&text).into_owned();
        let lines = text.lines().filter_map(|line| line.split_once('='));
        let lines = lines.filter(|(name, _)| name.trim() == key);
        values.extend(lines.map(|(_, value)| (path.clone(), value.trim().to_owned())));
    }
    let empty = values.iter().rposition(|(_, value)| value.is_empty());
    values.split_off(empty.map_or(0, |empty| empty + 1))
}

/// Finds the ports of the sockets, as drop-ins change them.
fn find_unit_ports(root: &Path) -> BTreeSet<u16> {
    let listen = |folders: &[&str; 2]| read_values(root, folders, "ListenStream", PORT);
    let values = SOCKETS.iter().flat_map(listen);
    values.filter_map(|(_, value)| value.rsplit(':').next()?.parse().ok()).collect()
}

/// Warns of several access lists for one socket, since systemd lets in whoever is in any of them.
pub fn explain_access_lists(root: &Path) -> Vec<String> {
    let lists = SOCKETS.iter().map(|folders| {
        let allowed = read_values(root, folders, "IPAddressAllow", "");
        let mut files: Vec<_> =
            allowed.iter().map(|(file, _)| file.display().to_string()).collect();
        files.dedup();
        files
    });
    let several: BTreeSet<_> = lists.filter(|files| files.len() > 1).collect();
    let warning = "several access lists hold, and whoever is in any of them is let in";
    several.iter().map(|files| format!("{warning}: {}", files.join(" and "))).collect()
}

/// Says whether HAProxy can ask, and which drop-ins hold for HAProxy's checks alone.
pub fn explain_sockets() -> Vec<String> {
    let root = Path::new("/");
    let port = find_unit_ports(root).into_iter().filter_map(|port| {
        if !ports::is_listening(port) {
            Some(format!(
                "nobody listens on port {port} of this machine; if HAProxy asks there: systemctl enable --now {NAME}.socket, or {NAME}-listen.socket for the listening pair"
            ))
        } else if ports::has_other_holder(port) {
            Some(format!(
                "not systemd, but xinetd or another program listens on port {port} of this machine: see ss -ltnp sport = :{port}"
            ))
        } else {
            None
        }
    });
    let files = SERVICES.into_iter().flat_map(|folder| find_drop_ins(root, &[folder]));
    let mut files: Vec<_> = files.map(|file| file.display().to_string()).collect();
    files.sort();
    let hold = "drop-ins, which hold for HAProxy's checks and not for this one";
    let drop_ins = (!files.is_empty()).then(|| format!("{hold}: {}", files.join(", ")));
    port.chain(drop_ins).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOTH: &str = SOCKETS[0][0];
    const USUAL: &str = SOCKETS[0][1];
    const LISTENING: &str = SOCKETS[1][1];

    fn write_drop_in(root: &Path, folder: &str, file: &str, text: &str) {
        let folder = root.join(FOLDER).join(folder);
        fs::create_dir_all(&folder).expect("a folder");
        fs::write(folder.join(file), format!("[Socket]\n{text}\n")).expect("a file");
    }

    #[test]
    fn the_ports_are_those_that_drop_ins_leave() {
        let root = tempfile::tempdir().expect("a folder");
        assert_eq!(find_unit_ports(root.path()), [5555].into());
        for (folder, file, text, wanted) in [
            (BOTH, "port.conf", "ListenStream=5556", &[5555, 5556][..]),
            (USUAL, "list.conf", "IPAddressDeny=any\nListenStream=[::1]:5557", &[5555, 5556, 5557]),
            (LISTENING, "old", "ListenStream=1", &[5555, 5556, 5557]),
            (BOTH, "port.conf", "ListenStream =\nListenStream= 0.0.0.0:5558", &[5558]),
            (BOTH, "list.conf", "ListenStream=/run/x", &[5558]),
            (LISTENING, "port.conf", "", &[5555, 5558]),
        ] {
            write_drop_in(root.path(), folder, file, text);
            assert_eq!(
                find_unit_ports(root.path()).into_iter().collect::<Vec<_>>(),
                wanted,
                "{file}"
            );
        }
    }

    #[test]
    fn access_lists_that_add_up_are_named() {
        let root = tempfile::tempdir().expect("a folder");
        let list = "IPAddressDeny=any\nIPAddressAllow=localhost\nIPAddressAllow=10.0.0.1 10.0.0.2";
        for (folder, file, text, wanted) in [
            (USUAL, "fence.conf", list, &[][..]),
            (BOTH, "port.conf", "ListenStream=5556", &[]),
            (BOTH, "access-list.conf", list, &[&[(BOTH, "access-list"), (USUAL, "fence")][..]]),
            // the file of 0.1.0 is in the folder of one pair, or in that of both pairs
            (
                BOTH,
                "fence.conf",
                list,
                &[
                    &[(BOTH, "access-list"), (BOTH, "fence")],
                    &[(BOTH, "access-list"), (USUAL, "fence")],
                ],
            ),
            // a file replaces its namesake in the folder of both pairs
            (USUAL, "fence.conf", "", &[&[(BOTH, "access-list"), (BOTH, "fence")]]),
            (LISTENING, "fence.conf", "IPAddressAllow=\nIPAddressAllow=10.0.0.3", &[]),
        ] {
            write_drop_in(root.path(), folder, file, text);
            let path = |(folder, file): &(&str, &str)| {
                let path = root.path().join(FOLDER).join(folder).join(file);
                format!("{}.conf", path.display())
            };
            let text = |lists: &&[_]| lists.iter().map(path).collect::<Vec<_>>().join(" and ");
            let wanted: Vec<_> = wanted.iter().map(text).collect();
            let told = explain_access_lists(root.path());
            let told: Vec<_> =
                told.iter().map(|line| line.split_once(": ").expect("files").1).collect();
            assert_eq!(told, wanted, "{folder} {file}");
        }
    }
}
