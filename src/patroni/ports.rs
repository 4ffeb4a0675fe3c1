//! Who listens on a port of this machine, as the kernel tells. In go a port and addresses, out come those addresses on which
//! Patroni's user or root listens. Knows nothing of HTTP.

use crate::sandbox::user;
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The kernel's lists of TCP sockets (proc(5)). With `ProcSubset=pid`, there is no `/proc/net`.
const TABLES: [&str; 2] = ["/proc/self/net/tcp", "/proc/self/net/tcp6"];
/// The kernel's lists of this machine's addresses.
const ADDRESSES: [&str; 2] = ["/proc/self/net/fib_trie", "/proc/self/net/if_inet6"];
const UID_MAP: &str = "/proc/self/uid_map";
/// The uid of `nobody`, and of each user who has no uid in a user namespace.
const OVERFLOW: u32 = 65534;
/// The folder that root makes for PostgreSQL's user.
const POSTGRESQL: &str = "/run/postgresql";
/// The most that the kernel usually returns at once.
const PAGE: usize = 4096;
/// The length of a line of IPv4. To fill a page, the kernel would search the table of all connections of the machine. If
/// there are few, that takes longer than the rest of a check through the listener.
const LINE: usize = 150;
/// How much of a list is read line by line. If more sockets listen, pages cost less.
const BY_LINE: u64 = 32 * LINE as u64;
/// The state of a socket that listens. The lists begin with such sockets.
const LISTENS: &[u8] = b"0A";
/// The state SYN_RECV, which Linux before 4.4 lists among them.
const SYN_RECV: &[u8] = b"03";
/// How long a check by hand looks for those who listen on port 5555.
const LOOK_LIMIT: Duration = Duration::from_secs(5);

/// A socket that listens.
#[derive(Clone, Debug, PartialEq, Eq)]
struct ListeningSocket {
    /// The address; an IPv4 address also if the socket is an IPv6 socket.
    ip: IpAddr,
    uid: u32,
    inode: u64,
}

impl ListeningSocket {
    /// The target of the links in `/proc/PID/fd` to this socket.
    fn link(&self) -> PathBuf {
        format!("socket:[{}]", self.inode).into()
    }
}

/// Why no Patroni was found.
#[derive(Debug)]
pub enum NotFound {
    /// Nobody listens.
    Nobody,
    /// Another user, with this uid, listens on this address.
    Stranger(SocketAddr, u32),
    /// Several sockets listen, and this process cannot see whose they are.
    Hidden,
    /// The kernel's lists cannot be read.
    Unreadable(io::Error),
}

/// The files that tell who listens. The process opens them before it is confined, and reads them afterwards.
#[derive(Debug)]
pub struct Sockets {
    tables: [io::Result<File>; 2],
    /// None if this process is known to see every user.
    uid_map: Option<File>,
    /// Patroni's user, who is trusted like root.
    patroni: Option<u32>,
    /// Whether `--patroni-user` names that user.
    given: bool,
}

impl Sockets {
    /// Opens the files. Patroni's `user` is a name in `/etc/passwd` or a number, and by default PostgreSQL's user.
    pub fn open(user: Option<&str>) -> Sockets {
        let owner = if user.is_none() { postgresql_owner() } else { None };
        let patroni = match user {
            Some(user) => user.parse().ok().or_else(|| user::find_uid(user)),
            None => owner.or_else(|| user::find_uid("postgres")),
        };
        // a process that sees that owner sees every user
        let uid_map = if owner.is_some() { None } else { File::open(UID_MAP).ok() };
        Sockets { tables: TABLES.map(File::open), uid_map, patroni, given: user.is_some() }
    }

    /// Finds the `candidates`, and by hand any other address, on which only Patroni's user or root listens.
    pub fn find_patroni(
        &self,
        port: u16,
        candidates: &[SocketAddr],
        by_hand: bool,
        deadline: Instant,
    ) -> Result<Vec<SocketAddr>, NotFound> {
        let mut sockets = self.read_table(0, port, deadline).map_err(NotFound::Unreadable)?;
        // an IPv4 socket comes before a dual-stack one, so this list is enough
        let found = self.select_trusted(candidates, &sockets);
        if !by_hand && !found.is_empty() {
            return Ok(found);
        }
        match self.read_table(1, port, deadline) {
            Ok(others) => sockets.extend(others),
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(NotFound::Unreadable(error)),
        }
        let mut addresses = candidates.to_vec();
        if by_hand {
            let own = sockets.iter().map(|socket| SocketAddr::new(socket.ip, port));
            addresses
                .extend(own.filter(|own| !own.ip().is_unspecified() && !own.ip().is_loopback()));
        }
        let found = self.select_trusted(&addresses, &sockets);
        if !found.is_empty() {
            return Ok(found);
        }
        addresses.retain(|address| !sockets_for(&sockets, address.ip()).is_empty());
        let theirs = addresses.iter().flat_map(|address| sockets_for(&sockets, address.ip()));
        let theirs: Vec<_> = theirs.collect();
        let [first, ..] = theirs[..] else { return Err(NotFound::Nobody) };
        if theirs.iter().all(|other| other.uid == OVERFLOW) && self.hides_users() {
            let one = theirs.iter().all(|other| other.inode == first.inode);
            return if one { Ok(addresses) } else { Err(NotFound::Hidden) };
        }
        Err(NotFound::Stranger(addresses[0], first.uid))
    }

    /// Selects the addresses on which only trusted users listen.
    fn select_trusted(
        &self,
        addresses: &[SocketAddr],
        sockets: &[ListeningSocket],
    ) -> Vec<SocketAddr> {
        let is_trusted = |address: &&SocketAddr| {
            let sockets = sockets_for(sockets, address.ip());
            !sockets.is_empty() && sockets.iter().all(|socket| self.is_trusted(socket.uid))
        };
        addresses.iter().filter(is_trusted).copied().collect()
    }

    fn is_trusted(&self, uid: u32) -> bool {
        // PostgreSQL may have been installed after this process was started
        let is_postgresql = || !self.given && postgresql_owner() == Some(uid);
        uid == 0 || self.patroni == Some(uid) || is_postgresql()
    }

    /// Whether this process cannot see whose a socket is: with `PrivateUsers=`, all other users look alike.
    fn hides_users(&self) -> bool {
        let mut map = [0; PAGE];
        let length = self.uid_map.as_ref().map_or(0, |file| file.read_at(&mut map, 0).unwrap_or(0));
        let text = String::from_utf8_lossy(&map[..length]);
        let has_overflow = |line: &str| {
            let numbers: Vec<u64> =
                line.split_ascii_whitespace().filter_map(|word| word.parse().ok()).collect();
            matches!(numbers[..], [first, _, count] if (first..first + count).contains(&OVERFLOW.into()))
        };
        length > 0 && !text.lines().any(has_overflow)
    }

    /// Reads the sockets that listen on this port. Stops at the first one in another state: many may follow.
    fn read_table(
        &self,
        family: usize,
        port: u16,
        deadline: Instant,
    ) -> io::Result<Vec<ListeningSocket>> {
        let file = self.tables[family].as_ref().map_err(|error| match error.raw_os_error() {
            Some(number) => io::Error::from_raw_os_error(number),
            None => error.kind().into(),
        })?;
        let port = format!("{port:04X}");
        let (mut found, mut text, mut offset) = (Vec::new(), Vec::new(), 0);
        let mut part = [0; PAGE];
        loop {
            let size = if offset < BY_LINE { LINE } else { PAGE };
            match file.read_at(&mut part[..size], offset) {
                Ok(0) => return Ok(found),
                Ok(length) => {
                    text.extend(&part[..length]);
                    offset += length as u64;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            }
            let end = text.iter().rposition(|byte| *byte == b'\n').map_or(0, |last| last + 1);
            for line in text[..end].split(|byte| *byte == b'\n') {
                let Some((local, state)) = parse_local_and_state(line) else { continue };
                if state != LISTENS && state != SYN_RECV {
                    return Ok(found);
                }
                if state == LISTENS && local.ends_with(port.as_bytes()) {
                    found.extend(parse_socket(line));
                }
            }
            text.drain(..end);
            if Instant::now() >= deadline {
                return Err(ErrorKind::TimedOut.into());
            }
        }
    }
}

/// The sockets to which the kernel gives a connection to this address: a socket bound to this address comes before one
/// bound to any.
fn sockets_for(sockets: &[ListeningSocket], ip: IpAddr) -> Vec<&ListeningSocket> {
    let any = match ip {
        IpAddr::V4(_) => Some(Ipv4Addr::UNSPECIFIED.into()),
        IpAddr::V6(_) => None,
    };
    let any_of_both = Some(Ipv6Addr::UNSPECIFIED.into());
    let at = |ip| sockets.iter().filter(|socket| socket.ip == ip).collect::<Vec<_>>();
    let mut levels = [Some(ip), any, any_of_both].into_iter().flatten().map(at);
    levels.find(|sockets| !sockets.is_empty()).unwrap_or_default()
}

/// The owner of PostgreSQL's folder, unless that is root or hidden.
fn postgresql_owner() -> Option<u32> {
    let owner = fs::metadata(POSTGRESQL).ok()?.uid();
    (!matches!(owner, 0 | OVERFLOW)).then_some(owner)
}

/// Whether somebody listens on this port, on any address.
pub fn is_listening(port: u16) -> bool {
    !find_listening_sockets(port).is_empty()
}

/// Whether a program other than systemd listens on this port; false if PID 1's sockets are hidden.
pub fn has_other_holder(port: u16) -> bool {
    let systemd: Vec<_> = files_of(Path::new("/proc/1")).collect();
    let is_systemd = |socket: &ListeningSocket| systemd.contains(&socket.link());
    !systemd.is_empty() && !find_listening_sockets(port).iter().all(is_systemd)
}

/// Describes who listens on this port: the address, the uid, and the processes that this user can see.
pub fn name_holders(port: u16) -> Vec<String> {
    let holder = |socket: ListeningSocket| {
        let address = SocketAddr::new(socket.ip, port);
        let processes = name_processes(&socket.link());
        format!("{address} is listened on by uid {}{processes}", socket.uid)
    };
    find_listening_sockets(port).into_iter().map(holder).collect()
}

/// Describes the processes that have this socket open.
fn name_processes(link: &Path) -> String {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten().map(|entry| entry.path());
    let name = |process: PathBuf| {
        let pid: u32 = process.file_name()?.to_str()?.parse().ok()?;
        let name = fs::read_to_string(process.join("comm")).unwrap_or_default();
        let has_it = files_of(&process).any(|file| file == link);
        has_it.then(|| format!(", pid {pid} ({})", name.trim_end()))
    };
    processes.filter_map(name).collect()
}

/// The files that a process has open; none if the kernel does not tell.
fn files_of(process: &Path) -> impl Iterator<Item = PathBuf> {
    let files = fs::read_dir(process.join("fd")).into_iter().flatten().flatten();
    files.filter_map(|file| fs::read_link(file.path()).ok())
}

/// All addresses of this machine, and some network addresses; none if the kernel does not tell.
pub fn own_addresses() -> Vec<IpAddr> {
    let [four, six] = ADDRESSES.map(|file| fs::read_to_string(file).unwrap_or_default());
    // fib_trie is a tree of networks, in which each address stands alone after this mark
    let four = four.lines().filter_map(|line| line.trim_start().strip_prefix("|-- "));
    let four = four.filter_map(|ip| ip.parse().ok()).map(IpAddr::V4);
    let six = six.lines().filter_map(|line| u128::from_str_radix(line.get(..32)?, 16).ok());
    let six = six.map(|bits| IpAddr::V6(bits.into()));
    four.chain(six).collect::<BTreeSet<_>>().into_iter().collect()
}

/// Finds all sockets that listen on this port.
fn find_listening_sockets(port: u16) -> Vec<ListeningSocket> {
    let (sockets, deadline) = (Sockets::open(None), Instant::now() + LOOK_LIMIT);
    let table = |family| sockets.read_table(family, port, deadline).unwrap_or_default();
    [table(0), table(1)].concat()
}

/// Parses a line's address with port, and its state. The peer's address with port, which is as long, is between them.
fn parse_local_and_state(line: &[u8]) -> Option<(&[u8], &[u8])> {
    // the first line has the names of the columns, and no colon
    let number = line.iter().position(|byte| *byte == b':')?;
    let rest = line.get(number + 2..)?;
    let width = rest.iter().position(|byte| *byte == b' ')?;
    Some((&rest[..width], rest.get(2 * width + 2..2 * width + 4)?))
}

/// Parses a line. Its words: number, address:port in hexadecimal, the peer's, state, three others, uid, another one, inode.
fn parse_socket(line: &[u8]) -> Option<ListeningSocket> {
    let mut words = std::str::from_utf8(line).ok()?.split_ascii_whitespace().skip(1);
    let (address, _) = words.next()?.split_once(':')?;
    // 32 bits at a time, in the order of this processor
    let part = |at: usize| u32::from_str_radix(address.get(at..at + 8)?, 16).ok();
    let ip = match address.len() {
        8 => IpAddr::from(part(0)?.to_ne_bytes()),
        _ => {
            let parts = [part(0)?, part(8)?, part(16)?, part(24)?].map(u32::to_ne_bytes);
            IpAddr::from(<[u8; 16]>::try_from(parts.as_flattened()).ok()?).to_canonical()
        }
    };
    let (uid, inode) = (words.nth(5)?.parse().ok()?, words.nth(1)?.parse().ok()?);
    Some(ListeningSocket { ip, uid, inode })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    const PATRONI: u32 = 101;
    const NOBODY: u32 = 65534;

    fn soon() -> Instant {
        Instant::now() + LOOK_LIMIT
    }

    #[test]
    fn a_line_of_each_family_is_parsed() {
        let v4 =
            b"   1: 0B004D0A:1F48 00000000:0000 0A 00000000:00000000 00:00000000 00000000   101        0 7 1";
        let v6 = b"  0: 000000FD000000000000000001000000:1F48 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000 0 0 8 1";
        let ip = |text: &str| text.parse().expect("an address");
        assert_eq!(
            parse_socket(v4),
            Some(ListeningSocket { ip: ip("10.77.0.11"), uid: 101, inode: 7 })
        );
        assert_eq!(parse_socket(v6), Some(ListeningSocket { ip: ip("fd00::1"), uid: 0, inode: 8 }));
        assert_eq!(parse_local_and_state(v4), Some((&b"0B004D0A:1F48"[..], LISTENS)));
        let names = b"  sl  local_address rem_address   st tx_queue rx_queue tr tm->when";
        assert_eq!((parse_local_and_state(names), parse_local_and_state(b"")), (None, None));
    }

    #[test]
    fn the_process_that_listens_is_found() {
        let there = TcpListener::bind("127.0.0.9:0").expect("a socket");
        let there = there.local_addr().expect("its address");
        assert!(find_listening_sockets(there.port()).iter().any(|socket| socket.ip == there.ip()));
        assert!(is_listening(there.port()));
        let me = format!("{there} is listened on by uid ");
        let holders = name_holders(there.port());
        let holder = holders.iter().find(|holder| holder.starts_with(&me)).expect("this process");
        assert!(holder.contains(&format!(", pid {} (", std::process::id())), "{holder}");
        assert!(!is_listening(0));
    }

    /// The sockets that listen take reads of a line and of a page.
    #[test]
    fn the_sockets_of_one_port_are_found_among_many() {
        let others: Vec<_> = (0..99).map(|_| TcpListener::bind("127.0.0.1:0")).collect();
        let last = others[98].as_ref().expect("a socket").local_addr().expect("its address");
        let found = Sockets::open(None).read_table(0, last.port(), soon()).expect("a table");
        assert_eq!(found.iter().map(|socket| socket.ip).collect::<Vec<_>>(), [last.ip()]);
        let late = Sockets::open(None).read_table(0, last.port(), Instant::now());
        assert_eq!(late.expect_err("too late").kind(), ErrorKind::TimedOut);
    }

    /// Makes lists with these sockets.
    fn sockets(tables: [&[(&str, u32)]; 2], uid_map: &str) -> Sockets {
        let file = |text: String| {
            let mut file = tempfile::tempfile()?;
            std::io::Write::write_all(&mut file, text.as_bytes())?;
            Ok(file)
        };
        let hex = |ip: &str| match ip.parse().expect("an address") {
            IpAddr::V4(ip) => format!("{:08X}", u32::from_ne_bytes(ip.octets())),
            IpAddr::V6(ip) => {
                let word = |part: &[u8]| u32::from_ne_bytes(part.try_into().expect("four bytes"));
                ip.octets().chunks(4).map(|part| format!("{:08X}", word(part))).collect()
            }
        };
        let table = |lines: &[(&str, u32)]| {
            let mut text = "  sl  local_address rem_address   st\n".to_owned();
            for (number, (ip, uid)) in lines.iter().enumerate() {
                let (local, peer) = (hex(ip), "0".repeat(hex(ip).len()));
                let inode = format!("{number}{uid}");
                text += &format!(
                    "   {number}: {local}:1F48 {peer}:0000 0A 0:0 00:0 0 {uid} 0 {inode} 1\n"
                );
            }
            // a connected socket comes after those that listen
            text += "   9: 0100007F:1F48 0100007F:9C40 01 0:0 00:0 0 0 0 9 1\n";
            text
        };
        Sockets {
            tables: tables.map(|lines| file(table(lines))),
            uid_map: file(uid_map.to_owned()).ok(),
            patroni: Some(PATRONI),
            given: true,
        }
    }

    const ALL: &str = "         0          0 4294967295\n";
    const PRIVATE: &str = "0 0 1\n990 990 1\n";

    fn found(tables: [&[(&str, u32)]; 2], uid_map: &str, asked: &str) -> String {
        let asked: Option<SocketAddr> = asked.parse().ok();
        let localhost = ["127.0.0.1:8008", "[::1]:8008"].map(|text| text.parse().expect("one"));
        let beside = asked.filter(|asked| !asked.ip().is_loopback());
        let beside = beside.map(|asked| SocketAddr::new(asked.ip(), 8008));
        let candidates: Vec<_> = localhost.into_iter().chain(beside).collect();
        match sockets(tables, uid_map).find_patroni(8008, &candidates, asked.is_none(), soon()) {
            Ok(addresses) => {
                addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
            }
            Err(NotFound::Stranger(address, uid)) => format!("{uid} at {address}"),
            Err(error) => format!("{error:?}"),
        }
    }

    #[test]
    fn only_patroni_is_found_wherever_a_stranger_listens() {
        let (node, other) = ("10.0.0.1:5555", "127.0.0.9:5555");
        let (local, nodes) = ("127.0.0.1:8008", "10.0.0.1:8008");
        for (four, six, asked, address) in [
            // each layout of Patroni, with strangers on the other addresses
            (
                &[("127.0.0.1", PATRONI), ("10.0.0.1", NOBODY)][..],
                &[("::1", NOBODY)][..],
                node,
                local,
            ),
            (&[("127.0.0.1", NOBODY), ("10.0.0.1", PATRONI)], &[("::1", 1000)], node, nodes),
            (
                &[("127.0.0.1", NOBODY), ("10.0.0.1", PATRONI)],
                &[],
                other,
                "65534 at 127.0.0.1:8008",
            ),
            (&[("0.0.0.0", PATRONI)], &[("::", NOBODY)], node, "127.0.0.1:8008 10.0.0.1:8008"),
            (
                &[("127.0.0.1", NOBODY), ("127.0.0.9", NOBODY)],
                &[("::1", PATRONI)],
                other,
                "[::1]:8008",
            ),
            (&[], &[("::", PATRONI)], node, "127.0.0.1:8008 [::1]:8008 10.0.0.1:8008"),
            // Patroni listens on IPv6 only, and a stranger on IPv4
            (&[("127.0.0.1", 33)], &[("::", PATRONI)], "127.0.0.1:5555", "[::1]:8008"),
            (&[("0.0.0.0", 33)], &[("::", PATRONI)], "[fd00::1]:5555", "[::1]:8008 [fd00::1]:8008"),
            (&[], &[("fd00::1", PATRONI), ("::", 33)], "[fd00::1]:5555", "[fd00::1]:8008"),
            (&[], &[("::ffff:127.0.0.1", PATRONI)], other, local),
            (&[("127.0.0.1", 0)], &[], node, local),
            // Patroni is away, or on another address than the one that HAProxy asked
            (&[("10.0.0.2", PATRONI)], &[], node, "Nobody"),
            (&[], &[], node, "Nobody"),
            (&[("127.0.0.1", NOBODY)], &[], node, "65534 at 127.0.0.1:8008"),
            (&[("10.0.0.1", NOBODY)], &[], node, "65534 at 10.0.0.1:8008"),
            (&[("127.0.0.9", NOBODY)], &[], other, "Nobody"),
            // by hand
            (&[("10.0.0.2", PATRONI), ("10.0.0.3", NOBODY)], &[], "", "10.0.0.2:8008"),
            (&[("127.0.0.9", PATRONI)], &[], "", "Nobody"),
            (
                &[("127.0.0.1", PATRONI)],
                &[("fd00::1", PATRONI)],
                "",
                "127.0.0.1:8008 [fd00::1]:8008",
            ),
        ] {
            assert_eq!(found([four, six], ALL, asked), address, "{four:?} {six:?} {asked}");
        }
    }

    /// `PrivateUsers=` shows everybody but root as `nobody`.
    #[test]
    fn where_owners_are_hidden_only_one_program_may_listen() {
        let node = "10.0.0.1:5555";
        for (four, six, address) in [
            (&[("10.0.0.1", NOBODY)][..], &[][..], "10.0.0.1:8008"),
            (&[("0.0.0.0", NOBODY)], &[], "127.0.0.1:8008 10.0.0.1:8008"),
            (&[], &[("::", NOBODY)], "127.0.0.1:8008 [::1]:8008 10.0.0.1:8008"),
            (&[("127.0.0.1", NOBODY), ("10.0.0.1", NOBODY)], &[], "Hidden"),
            (&[("127.0.0.1", NOBODY), ("10.0.0.1", 0)], &[], "10.0.0.1:8008"),
            (&[("127.0.0.1", 990)], &[], "990 at 127.0.0.1:8008"),
        ] {
            assert_eq!(found([four, six], PRIVATE, node), address, "{four:?} {six:?}");
        }
    }
}
