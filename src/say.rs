//! From the verdict to HAProxy's agent reply: one line, one write, a clean close; and the only
//! place that prints. Knows nothing of why.

use crate::check::Else;
use crate::connection::Connection;
use crate::decide::{Reply, Verdict};
use crate::memory::News;
use crate::options::{NAME, Stop};
use crate::syslog;
use rustix::io::Errno;
use rustix::net::{self, AddressFamily, RecvFlags, SendFlags, getpeername};
use std::io::{self, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::process::ExitCode;

/// HAProxy keeps about 108 characters of the text (`HCHK_DESC_LEN` in its source).
const REASON_LIMIT: usize = 100;
/// What goes to the journal or a terminal may be longer.
const LOG_LIMIT: usize = 1000;
/// How often the line is tried, and how many times 1024 unread bytes are taken off the connection.
const TRIES: usize = 16;
/// In the journal, at most once a minute.
const NOT_UNDERSTOOD: &str = "no agent-send line that can be understood (the reply says why)";
/// Usage, in sysexits(3).
const USAGE: u8 = 64;

/// The agent reply line (HAProxy's configuration manual, `agent-check`).
///
/// Always a health word and an admin word, since each heals only its own kind: `ready` alone never
/// brings back a server that an agent has called down. `down ready` rather than `down`, which is
/// not seen on a server in MAINT. A word that HAProxy does not know changes nothing and is shown.
pub fn line(reply: &Reply) -> String {
    let reason = printable(&reply.reason, REASON_LIMIT);
    match (words(reply.verdict), reply.verdict) {
        // HAProxy also splits words at commas.
        (word, Verdict::Keep) => format!("{word}:_{}\n", reason.replace([' ', ','], "_")),
        (words, _) => format!("{words} # {reason}\n"),
    }
}

/// The words of the reply, without the reason.
pub fn words(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Ready => "up ready",
        Verdict::Out(Else::Maint) => "up maint",
        Verdict::Out(Else::Drain) => "up drain",
        Verdict::Out(Else::Down) | Verdict::Down => "down ready",
        Verdict::Fail | Verdict::Unasked | Verdict::NotUnderstood => "fail ready",
        Verdict::Stopped => "stopped ready",
        Verdict::Keep => "!unreachable",
    }
}

/// Nothing from outside gets further than this as it came: printable ASCII only.
fn printable(text: &str, limit: usize) -> String {
    text.chars().map(|c| if matches!(c, ' '..='~') { c } else { '?' }).take(limit).collect()
}

/// Answers, and tells how to exit: behind a socket always 0, since systemd keeps a failed unit's
/// place; else 0 in the pool, 1 healthy but not in the pool, 2 broken.
pub fn say(connection: Connection, reply: &Reply, news: Option<News>) -> ExitCode {
    let line = line(reply);
    match connection {
        Connection::Socket(stream) => {
            let peer = news.map(|_| stream.peer_addr());
            send(&stream, &line);
            if let (Some(news), Some(peer)) = (news, peer) {
                // a dual-stack socket shows IPv4 as ::ffff:10.0.0.1
                let canonical =
                    |peer: SocketAddr| SocketAddr::new(peer.ip().to_canonical(), peer.port());
                let peer = peer.map(|peer| canonical(peer).to_string()).unwrap_or_default();
                let (level, since) = match news {
                    News::Began => (4, String::new()),
                    News::Lasts(time) => (4, format!(" (trouble for {:.0} s)", time.as_secs_f32())),
                    News::Ended(time) => {
                        (5, format!(" (after {:.1} s of trouble)", time.as_secs_f32()))
                    }
                };
                let (words, about) = match reply.verdict {
                    // nothing that a peer made up gets into the journal
                    Verdict::NotUnderstood => (words(reply.verdict), NOT_UNDERSTOOD.to_owned()),
                    verdict => (words(verdict), about(reply)),
                };
                log(level, &format!("replied '{words}' to {peer}: {about}{since}"));
            }
            ExitCode::SUCCESS
        }
        Connection::Standard => {
            print(&line);
            complain(&about(reply));
            ExitCode::from(match reply.verdict {
                Verdict::Ready => 0,
                Verdict::Out(_) => 1,
                _ => 2,
            })
        }
    }
}

/// The check and the whole reason, for the journal or a human.
fn about(reply: &Reply) -> String {
    let nothing = if reply.verdict == Verdict::Keep { "nothing changes in HAProxy: " } else { "" };
    match reply.check.as_str() {
        "" => format!("{nothing}{}", reply.reason),
        check => format!("{check}: {nothing}{}", reply.reason),
    }
}

/// One write: HAProxy 2.6 may complete a split line with bytes of its other clients. HAProxy usually
/// resets the connection right after the line, so nothing that comes later is an error.
fn send(stream: &TcpStream, line: &str) {
    // Nothing here waits for a peer. A send that fails for want of memory may work a moment later, and silence
    // would leave HAProxy with what it heard last.
    let once = || net::send(stream, line.as_bytes(), SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
    let _ = (0..TRIES).any(|_| once().is_ok());
    let _ = stream.shutdown(Shutdown::Write);
    // Closing with unread bytes would reset the connection, and with it perhaps the line.
    let mut rest = [0; 1024];
    for _ in 0..TRIES {
        match net::recv(stream, &mut rest, RecvFlags::DONTWAIT) {
            Ok((1.., _)) | Err(Errno::INTR) => {}
            _ => break,
        }
    }
}

/// Says what is wrong with the command line, or prints what it asks for.
pub fn stop(connection: Connection, stop: &Stop) -> ExitCode {
    match (connection, stop) {
        (Connection::Standard, Stop::Print(text)) => {
            print(text);
            ExitCode::SUCCESS
        }
        (Connection::Standard, Stop::Usage(error)) => misused(error),
        // Silence would leave HAProxy with what it heard last, which may be READY.
        (socket, stop) => say(
            socket,
            &Reply {
                verdict: Verdict::Fail,
                check: String::new(),
                reason: match stop {
                    Stop::Usage(error) => format!("{NAME}: {error}"),
                    Stop::Print(_) => format!("{NAME}: --help and --version are for a terminal"),
                },
            },
            Some(News::Began),
        ),
    }
}

/// Says something that a human wants to know and HAProxy's journal does not, at every check.
pub fn remark(connection: &Connection, text: &str) {
    if let Connection::Standard = connection {
        complain(text);
    }
}

/// Tells the journal what no answer tells.
pub fn warn(text: &str) {
    log(4, text);
}

/// Says how this program was started wrongly, where there is nobody to answer.
pub fn misused(error: &str) -> ExitCode {
    complain(error);
    ExitCode::from(USAGE)
}

fn print(text: &str) {
    let mut stdout = io::stdout().lock();
    let _ = stdout.write_all(text.as_bytes());
    let _ = stdout.flush();
}

/// One line for the journal: by the system log, or by stderr as sd-daemon(3) has it.
fn log(priority: u8, text: &str) {
    if !syslog::send(priority, NAME, &printable(text, LOG_LIMIT)) {
        to_stderr(&format!("<{priority}>{text}"));
    }
}

/// One line for whoever started this program, who may be a human.
fn complain(text: &str) {
    if !syslog::send(4, NAME, &printable(text, LOG_LIMIT)) {
        to_stderr(&format!("{NAME}: {text}"));
    }
}

/// One line on stderr, unless stderr is the peer: xinetd makes fd 2 the connection as well.
fn to_stderr(text: &str) {
    let stderr = io::stderr();
    let family = getpeername(&stderr).ok().flatten().map(|peer| peer.address_family());
    if matches!(family, Some(AddressFamily::INET | AddressFamily::INET6)) {
        return;
    }
    let line = format!("{}\n", printable(text, LOG_LIMIT));
    let _ = stderr.lock().write_all(line.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(verdict: Verdict, reason: &str) -> String {
        line(&Reply { verdict, check: "primary".to_owned(), reason: reason.to_owned() })
    }

    #[test]
    fn both_words_and_the_reason() {
        let lines = [
            (Verdict::Ready, "up ready # why\n"),
            (Verdict::Out(Else::Maint), "up maint # why\n"),
            (Verdict::Out(Else::Drain), "up drain # why\n"),
            (Verdict::Out(Else::Down), "down ready # why\n"),
            (Verdict::Fail, "fail ready # why\n"),
            (Verdict::Stopped, "stopped ready # why\n"),
            (Verdict::Down, "down ready # why\n"),
            (Verdict::Keep, "!unreachable:_why\n"),
        ];
        for (verdict, line) in lines {
            assert_eq!(said(verdict, "why"), line);
        }
    }

    #[test]
    fn no_reason_can_break_the_line_or_add_a_word() {
        let evil = format!("a\nup ready\r\0\t\u{1b}[31m # é, down{}", "x".repeat(500));
        let line = said(Verdict::Fail, &evil);
        assert_eq!(line.len(), "fail ready # ".len() + REASON_LIMIT + 1);
        assert!(line.starts_with("fail ready # a?up ready????[31m # ?, down"));
        let word = said(Verdict::Keep, &evil);
        assert_eq!(word.find([' ', ',', '\t', '\n']), Some(word.len() - 1));
    }
}
