//! The exchange of exchange.c in plain Rust, which shows the cost of Rust's standard library.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpStream};
use std::os::fd::AsFd;

fn main() -> std::io::Result<()> {
    let mut haproxy = TcpStream::from(std::io::stdin().as_fd().try_clone_to_owned()?);
    let mut line = [0; 257];
    let count = haproxy.read(&mut line)?;
    assert!(line[..count].contains(&b'\n'));
    let port = std::env::args().nth(1).and_then(|port| port.parse().ok()).expect("a port");
    let mut patroni = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
    patroni.write_all(b"GET /primary HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")?;
    let mut answer = Vec::with_capacity(4096);
    patroni.read_to_end(&mut answer)?;
    let answer = String::from_utf8_lossy(&answer);
    let ready = answer.starts_with("HTTP/1.0 200 ")
        && answer.contains(r#""state": "running""#)
        && answer.contains(r#""role": "primary""#);
    haproxy.set_nonblocking(true)?;
    haproxy.write_all(match ready {
        true => b"up ready # primary, running, timeline 5\n".as_slice(),
        false => b"up maint # not the primary\n",
    })?;
    haproxy.shutdown(Shutdown::Write)?;
    let _ = haproxy.read(&mut line);
    Ok(())
}
