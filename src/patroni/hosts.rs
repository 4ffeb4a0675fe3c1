//! The addresses of a host. In goes a name, out come its addresses in `/etc/hosts`. Hand-written, since a crate for this is
//! a whole resolver, and a static program cannot use glibc's name services. Knows nothing of sockets.

use crate::file;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;

/// The file of hosts(5).
pub const HOSTS: &str = "/etc/hosts";
/// The longest `/etc/hosts` in bytes: some 20,000 names.
const SIZE_LIMIT: u64 = 1024 * 1024;
/// The most addresses of a host that the agent tries.
const MOST_ADDRESSES: usize = 16;

/// Parses an address or `localhost`, which has two addresses; none for any other name.
pub fn parse_address(host: &str) -> Option<Vec<IpAddr>> {
    if host.eq_ignore_ascii_case("localhost") {
        return Some(vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()]);
    }
    host.parse().ok().map(|address| vec![address])
}

/// Looks up a host: an address, `localhost`, or a name in `/etc/hosts`, whose order counts.
pub fn look_up(host: &str) -> Result<Vec<IpAddr>, String> {
    if let Some(addresses) = parse_address(host) {
        return Ok(addresses);
    }
    let (hosts, error) = match file::read(Path::new(HOSTS), SIZE_LIMIT) {
        Ok(hosts) => (hosts, String::new()),
        Err(error) => (Vec::new(), format!(" ({error})")),
    };
    let found = Some(find_name(&hosts, host)).filter(|found| !found.is_empty());
    found.ok_or(format!("not in {HOSTS}{error}, and DNS is not used: give --connect-to ADDRESS"))
}

/// Finds the addresses of a name as hosts(5) describes: each line has an address and its names, and `#` begins a comment. An
/// address with an interface, such as `fe80::1%eth0`, does not count.
fn find_name(hosts: &[u8], host: &str) -> Vec<IpAddr> {
    let address = |line: &[u8]| {
        let line = line.split(|byte| *byte == b'#').next()?;
        let mut words = line.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty());
        let address = words.next()?;
        words.find(|name| name.eq_ignore_ascii_case(host.as_bytes()))?;
        std::str::from_utf8(address).ok()?.parse().ok()
    };
    hosts.split(|byte| *byte == b'\n').filter_map(address).take(MOST_ADDRESSES).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(hosts: &[u8], host: &str) -> Vec<String> {
        find_name(hosts, host).iter().map(IpAddr::to_string).collect()
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
    fn at_most_sixteen_addresses_are_tried() {
        let hosts = (0..99).map(|number| format!("10.0.0.{number} pg1\n")).collect::<String>();
        let found = texts(hosts.as_bytes(), "pg1");
        assert_eq!((found.len(), found[15].as_str()), (MOST_ADDRESSES, "10.0.0.15"));
    }

    #[test]
    fn an_address_and_localhost_need_no_file() {
        assert_eq!(look_up("10.0.0.1"), Ok(vec!["10.0.0.1".parse().expect("an address")]));
        assert_eq!(look_up("fd00::1"), Ok(vec!["fd00::1".parse().expect("an address")]));
        let both = ["127.0.0.1", "::1"].map(|text| text.parse().expect("an address"));
        assert_eq!(look_up("LocalHost"), Ok(both.to_vec()));
    }

    #[test]
    fn the_error_for_an_unknown_host_names_connect_to() {
        let error = look_up("nowhere.invalid").expect_err("no address");
        assert_eq!(error, "not in /etc/hosts, and DNS is not used: give --connect-to ADDRESS");
    }
}
