//! What `--explain` says of this machine: whether HAProxy could ask, and what holds for its checks alone. In go drop-ins and
//! the kernel's tables, out come lines. Knows nothing of the command line.

use crate::NAME;
use crate::file;
use crate::patroni::ports;
use std::fs;
use std::path::Path;

/// The longest drop-in in bytes.
const SIZE_LIMIT: u64 = 64 * 1024;
/// The port of the units.
const PORT: u16 = 5555;
/// Drop-ins of the sockets.
const SOCKETS: [&str; 3] = [
    "etc/systemd/system/patroni-agent-.socket.d",
    "etc/systemd/system/patroni-agent-check.socket.d",
    "etc/systemd/system/patroni-agent-check-listen.socket.d",
];
/// Drop-ins of the services.
const DROP_INS: [&str; 2] = [
    "/etc/systemd/system/patroni-agent-check@.service.d",
    "/etc/systemd/system/patroni-agent-check-listen.service.d",
];

/// The ports of the units' sockets, as drop-ins change them. systemd reads drop-ins in the order of their names.
fn unit_ports(root: &Path) -> Vec<u16> {
    let folders = SOCKETS.iter().filter_map(|folder| fs::read_dir(root.join(folder)).ok());
    let mut files: Vec<_> = folders.flatten().flatten().map(|file| file.path()).collect();
    files.retain(|file| file.extension().is_some_and(|extension| extension == "conf"));
    files.sort_by(|one, other| one.file_name().cmp(&other.file_name()));
    let mut ports = vec![PORT];
    for text in files.iter().filter_map(|file| file::read(file, SIZE_LIMIT).ok()) {
        let text = String::from_utf8_lossy(&text).into_owned();
        for (key, value) in text.lines().filter_map(|line| line.split_once('=')) {
            if key.trim() != "ListenStream" {
                continue;
            }
            if value.trim().is_empty() {
                ports.clear();
            }
            ports.extend(value.trim().rsplit(':').next().and_then(|port| port.parse::<u16>().ok()));
        }
    }
    ports.sort_unstable();
    ports.dedup();
    ports
}

/// Whether HAProxy can ask, and the drop-ins that hold for HAProxy's checks alone.
pub fn explain_sockets() -> Vec<String> {
    let port = unit_ports(Path::new("/")).into_iter().filter_map(|port| {
        if !ports::is_listening(port) {
            Some(format!(
                "nobody listens on port {port} of this machine; if HAProxy asks there: systemctl enable --now {NAME}.socket"
            ))
        } else if ports::is_foreign(port) {
            Some(format!(
                "not systemd, but xinetd or another program listens on port {port} of this machine: see ss -ltnp sport = :{port}"
            ))
        } else {
            None
        }
    });
    let files = DROP_INS.into_iter().filter_map(|folder| fs::read_dir(folder).ok()).flatten();
    let mut files: Vec<_> = files.flatten().map(|file| file.path().display().to_string()).collect();
    files.retain(|file| file.ends_with(".conf"));
    files.sort();
    let drop_ins = (!files.is_empty()).then(|| {
        format!(
            "drop-ins, which hold for HAProxy's checks and not for this one: {}",
            files.join(", ")
        )
    });
    port.chain(drop_ins).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ports_are_those_that_drop_ins_leave() {
        let root = tempfile::tempdir().expect("a folder");
        assert_eq!(unit_ports(root.path()), [PORT]);
        for (folder, file, text, wanted) in [
            (SOCKETS[0], "port.conf", "[Socket]\nListenStream=5556\n", &[5555, 5556][..]),
            (
                SOCKETS[1],
                "fence.conf",
                "[Socket]\nIPAddressDeny=any\nListenStream=[::1]:5557",
                &[5555, 5556, 5557],
            ),
            (SOCKETS[2], "old", "[Socket]\nListenStream=1\n", &[5555, 5556, 5557]),
            (
                SOCKETS[0],
                "port.conf",
                "[Socket]\nListenStream =\nListenStream= 0.0.0.0:5558\n",
                &[5558],
            ),
            (SOCKETS[0], "fence.conf", "[Socket]\nListenStream=/run/x\n", &[5558]),
        ] {
            fs::create_dir_all(root.path().join(folder)).expect("a folder");
            fs::write(root.path().join(folder).join(file), text).expect("a file");
            assert_eq!(unit_ports(root.path()), wanted, "{file}");
        }
    }
}
