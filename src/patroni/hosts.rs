//! The addresses of a host: those that are written, and those of `/etc/hosts`; and those on which somebody listens. Knows
//! no DNS and none of the machine's other name services: they may be slow, and glibc's would be loaded into the static
//! program.

use crate::file;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;

/// hosts(5)
pub const HOSTS: &str = "/etc/hosts";
/// The longest `/etc/hosts` in bytes: some 20,000 names.
const LIMIT: u64 = 1024 * 1024;
/// No host of a Patroni has more addresses; each one that refuses costs a try.
const ADDRESSES: usize = 16;

/// An address itself or both addresses of `localhost`; none of a name, for which [`HOSTS`] must be read.
pub fn written(host: &str) -> Option<Vec<IpAddr>> {
    if host.eq_ignore_ascii_case("localhost") {
        return Some(vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()]);
    }
    host.parse().ok().map(|address| vec![address])
}

/// An address itself, both addresses of `localhost`, or those of a name in `/etc/hosts`, in its order.
///
/// # Errors
///
/// The name is not in `/etc/hosts`; if that cannot be read, the text says so.
pub fn addresses(host: &str) -> Result<Vec<IpAddr>, String> {
    if let Some(addresses) = written(host) {
        return Ok(addresses);
    }
    let (hosts, error) = match file::read(Path::new(HOSTS), LIMIT) {
        Ok(hosts) => (hosts, String::new()),
        Err(error) => (Vec::new(), format!(" ({error})")),
    };
    match named(&hosts, host) {
        found if found.is_empty() => {
            Err(format!("not in {HOSTS}{error}, and DNS is not used: give --connect-to ADDRESS"))
        }
        found => Ok(found),
    }
}

/// hosts(5): an address and its names in each line, `#` begins a comment. A line that is none of this is left out,
/// and so is an address that is good on one interface only, such as `fe80::1%eth0`.
fn named(hosts: &[u8], host: &str) -> Vec<IpAddr> {
    let address = |line: &[u8]| {
        let line = line.split(|byte| *byte == b'#').next()?;
        let mut words = line.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty());
        let address = words.next()?;
        words.find(|name| name.eq_ignore_ascii_case(host.as_bytes()))?;
        std::str::from_utf8(address).ok()?.parse().ok()
    };
    hosts.split(|byte| *byte == b'\n').filter_map(address).take(ADDRESSES).collect()
}

/// proc(5): the sockets of this machine, for IPv4 and IPv6.
const SOCKETS: [&str; 2] = ["/proc/net/tcp", "/proc/net/tcp6"];
/// The longest list of sockets in bytes: some 100,000 of them.
const SOCKETS_LIMIT: u64 = 16 * 1024 * 1024;

/// Where somebody listens on this port, at an address of this machine. Nobody, if the kernel does not tell.
pub fn listening(port: u16) -> Vec<SocketAddr> {
    let mut found = listeners(port);
    found.retain(|listener| !listener.ip().is_unspecified());
    found.truncate(ADDRESSES);
    found
}

/// Whether somebody listens on this port, at any address.
pub fn is_listening(port: u16) -> bool {
    !listeners(port).is_empty()
}

fn listeners(port: u16) -> Vec<SocketAddr> {
    let read = |file| file::read(Path::new(file), SOCKETS_LIMIT).unwrap_or_default();
    let files = SOCKETS.map(read);
    let lines = files.iter().flat_map(|file| file.split(|byte| *byte == b'\n'));
    lines.filter_map(listener).filter(|listener| listener.port() == port).collect()
}

/// A line of a socket that listens: its number, its address and port in hexadecimal, the peer's, its state.
fn listener(line: &[u8]) -> Option<SocketAddr> {
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
    (words.nth(1)? == "0A").then(|| SocketAddr::new(ip, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(hosts: &[u8], host: &str) -> Vec<String> {
        named(hosts, host).iter().map(IpAddr::to_string).collect()
    }

    #[test]
    fn a_name_has_all_its_addresses_in_the_order_of_the_file() {
        let hosts = b"127.0.0.1\tlocalhost\n\
            # 10.0.0.9 pg1.example\n\
            fd00::1\t \tpg1.example pg1 # pg2.example\r\n\
            10.0.0.1 db PG1.Example\n\
            \xff\xfe 10.0.0.7 pg1.example\n\
            10.0.0.2 pg1.example.org xpg1.example pg1.example\xff\n\
            fe80::1%eth0 pg1.example\n\
            10.0.0.300 pg1.example\n\
            pg1.example 10.0.0.8\n\
            10.0.0.6#pg1.example\n\
            \x0010.0.0.5 pg1.example\n\
            10.0.0.4\n\n   \n\
            \xc3\x28 pg1.example\n  ::ffff:10.0.0.3 \xff pg1.example";
        assert_eq!(texts(hosts, "pg1.example"), ["fd00::1", "10.0.0.1", "::ffff:10.0.0.3"]);
        assert_eq!(texts(hosts, "pg1.EXAMPLE"), texts(hosts, "pg1.example"));
        assert_eq!(texts(hosts, "pg1"), ["fd00::1"]);
        assert_eq!(texts(hosts, "pg2.example"), [""; 0]);
        assert_eq!(texts(hosts, "10.0.0.1"), [""; 0]);
        assert_eq!(texts(b"", "pg1"), [""; 0]);
    }

    #[test]
    fn not_without_end() {
        let hosts = (0..99).map(|number| format!("10.0.0.{number} pg1\n")).collect::<String>();
        let found = texts(hosts.as_bytes(), "pg1");
        assert_eq!((found.len(), found[15].as_str()), (ADDRESSES, "10.0.0.15"));
    }

    #[test]
    fn what_is_written_needs_no_file() {
        assert_eq!(addresses("10.0.0.1"), Ok(vec!["10.0.0.1".parse().expect("an address")]));
        assert_eq!(addresses("fd00::1"), Ok(vec!["fd00::1".parse().expect("an address")]));
        let both = ["127.0.0.1", "::1"].map(|text| text.parse().expect("an address"));
        assert_eq!(addresses("LocalHost"), Ok(both.to_vec()));
    }

    #[test]
    fn a_name_from_nowhere_is_told_its_cure() {
        let error = addresses("nowhere.invalid").expect_err("no address");
        assert_eq!(error, "not in /etc/hosts, and DNS is not used: give --connect-to ADDRESS");
    }

    #[test]
    fn a_socket_that_listens() {
        let v4 =
            b"   1: 0B004D0A:1F48 00000000:0000 0A 00000000:00000000 00:00000000 00000000 0 0 1 1";
        let v6 = b"  0: 000000FD000000000000000001000000:1F48 00000000000000000000000000000000:0000 0A 0";
        let connected =
            b"   2: 0B004D0A:1F48 0B004D0A:9C40 01 00000000:00000000 00:00000000 00000000 0 0 2 1";
        assert_eq!(listener(v4), Some("10.77.0.11:8008".parse().expect("an address")));
        assert_eq!(listener(v6), Some("[fd00::1]:8008".parse().expect("an address")));
        assert_eq!(listener(connected), None);
        assert_eq!(
            listener(b"  sl  local_address rem_address   st tx_queue rx_queue tr tm->when"),
            None
        );
        assert_eq!(listener(b""), None);
    }

    #[test]
    fn where_somebody_listens() {
        let there = std::net::TcpListener::bind("127.0.0.9:0").expect("a socket");
        let there = there.local_addr().expect("its address");
        assert_eq!(listening(there.port()), [there]);
    }
}
