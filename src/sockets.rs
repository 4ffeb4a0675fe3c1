//! The sockets of this machine on which somebody listens, as the kernel tells them; a check by hand looks there. Knows
//! nothing of who that is.

use crate::file;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;

/// proc(5): the sockets of this machine, for IPv4 and IPv6.
const SOCKETS: [&str; 2] = ["/proc/net/tcp", "/proc/net/tcp6"];
/// The longest list of sockets in bytes: some 100,000 of them.
const LIMIT: u64 = 16 * 1024 * 1024;

/// No port of a service is listened on at more addresses; each one that is asked in vain costs a try.
const MOST: usize = 16;

/// Where somebody listens on this port, at an address of this machine. Nobody, if the kernel does not tell.
pub fn listening(port: u16) -> Vec<SocketAddr> {
    let mut found: Vec<_> = listeners(port).into_iter().map(|(address, _)| address).collect();
    found.retain(|listener| !listener.ip().is_unspecified());
    found.truncate(MOST);
    found
}

/// Whether somebody listens on this port, at any address.
pub fn is_listening(port: u16) -> bool {
    !listeners(port).is_empty()
}

/// Whether somebody listens on this port with a socket that is not systemd's. Nobody, if the kernel does not tell this
/// user what PID 1 has.
pub fn is_foreign(port: u16) -> bool {
    let files = fs::read_dir("/proc/1/fd").into_iter().flatten().flatten();
    let systemds: Vec<_> = files.filter_map(|file| fs::read_link(file.path()).ok()).collect();
    let is_systemds = |inode| systemds.contains(&format!("socket:[{inode}]").into());
    !systemds.is_empty() && listeners(port).into_iter().any(|(_, inode)| !is_systemds(inode))
}

fn listeners(port: u16) -> Vec<(SocketAddr, u64)> {
    let read = |file| file::read(Path::new(file), LIMIT).unwrap_or_default();
    let files = SOCKETS.map(read);
    let lines = files.iter().flat_map(|file| file.split(|byte| *byte == b'\n'));
    lines.filter_map(listener).filter(|(listener, _)| listener.port() == port).collect()
}

/// A line of a socket that listens: its number, its address and port in hexadecimal, the peer's, its state, and as the
/// tenth word its inode.
fn listener(line: &[u8]) -> Option<(SocketAddr, u64)> {
    let mut words = std::str::from_utf8(line).ok()?.split_ascii_whitespace().skip(1);
    let (address, port) = words.next()?.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    // 32 bits at a time, in the order of this processor
    let part = |at: usize| u32::from_str_radix(address.get(at..at + 8)?, 16).ok();
    let ip = match address.len() {
        8 => IpAddr::from(part(0)?.to_ne_bytes()),
        _ => {
            let mut bytes = [0; 16];
            for (number, bytes) in bytes.chunks_mut(4).enumerate() {
                bytes.copy_from_slice(&part(number * 8)?.to_ne_bytes());
            }
            IpAddr::from(bytes).to_canonical()
        }
    };
    let listens = words.nth(1)? == "0A";
    let inode = words.nth(5)?.parse().ok()?;
    listens.then(|| (SocketAddr::new(ip, port), inode))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn a_socket_that_listens() {
        let v4 =
            b"   1: 0B004D0A:1F48 00000000:0000 0A 00000000:00000000 00:00000000 00000000 0 0 7 1";
        let v6 = b"  0: 000000FD000000000000000001000000:1F48 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000 0 0 8 1";
        let connected =
            b"   2: 0B004D0A:1F48 0B004D0A:9C40 01 00000000:00000000 00:00000000 00000000 0 0 2 1";
        assert_eq!(listener(v4), Some(("10.77.0.11:8008".parse().expect("an address"), 7)));
        assert_eq!(listener(v6), Some(("[fd00::1]:8008".parse().expect("an address"), 8)));
        assert_eq!(listener(connected), None);
        assert_eq!(
            listener(b"  sl  local_address rem_address   st tx_queue rx_queue tr tm->when"),
            None
        );
        assert_eq!(listener(b""), None);
    }

    #[test]
    fn where_somebody_listens() {
        let there = TcpListener::bind("127.0.0.9:0").expect("a socket");
        let there = there.local_addr().expect("its address");
        let mut found = listening(there.port());
        // whoever else has this port has it at another address
        found.retain(|listener| listener.ip() == there.ip());
        assert_eq!(found, [there]);
        assert!(is_listening(there.port()));
    }
}
